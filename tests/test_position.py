"""A call may be a part of a larger sequence. Its position there is an array, which band, ALiBi and dropout depend on.

Sequence parallelism is built on it (test_ring.py). A sequence is cut into parts of queries and keys, and the merged
results of the parts equal the whole.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flash
from jax_flash import validate
from jax_flash.autodiff import attend
from jax_flash.operands import OPTIONAL
from jax_flash.options import FixedArguments, PagedArguments, VarlenArguments
from jax_flash.paged import validate as paged_validate
from jax_flash.spec import AttentionSpec

Call = tuple[AttentionSpec, dict[str, Any]]
B, S, HQ, HK, D = 2, 96, 4, 2, 16
Q_CUTS, K_CUTS = (0, 40, 96), (0, 33, 64, 96)
DEFAULTS = dict.fromkeys(
    (
        "window",
        "mask",
        "bias",
        "alibi_slopes",
        "sinks",
        "q_lengths",
        "kv_lengths",
        "segment_ids",
        "scale",
        "softcap",
    )
) | {
    "causal": False, "align": "top_left", "deterministic": False, "return_lse": True, "implementation": None,
}  # fmt: skip
OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (20, 5)},
    "causal window": {"causal": True, "window": (30, None)},
    "alibi": {"alibi_slopes": np.linspace(0.1, 0.4, HQ, dtype=np.float32)},
    "alibi causal softcap": {"causal": True, "softcap": 4.0, "alibi_slopes": np.full(HQ, 0.2, np.float32)},
    "dropout": {"dropout_rate": 0.3, "causal": True},
    "deterministic": {"causal": True, "deterministic": True},
}


def tokens(seed: int, heads: int, shape: tuple[int, ...] = (B, S)) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (*shape, heads, D), jnp.float32)


def options_of(name: str, implementation: str) -> dict[str, Any]:
    given = dict(OPTIONS[name])
    if "dropout_rate" in given:
        given["dropout_key"] = jax.random.key(5)
    return DEFAULTS | given | {"implementation": implementation}


def filled(arguments: type[Any], options: dict[str, Any]) -> Any:
    """An instance of `arguments`, filled from the options that it has."""
    names = [field.name for field in dataclasses.fields(arguments) if field.name in options]
    return arguments(**{name: options[name] for name in names})


def fixed(q: Any, k: Any, v: Any, options: dict[str, Any]) -> Call:
    """The checked flash_attention call."""
    return validate.fixed("fixed", filled(FixedArguments, options | {"query": q, "key": k, "value": v}))


def varlen(q: Any, k: Any, v: Any, starts: Any, options: dict[str, Any]) -> Call:
    """The checked flash_attention_varlen call."""
    offsets = {"cu_seqlens_q": starts, "cu_seqlens_k": None}
    return validate.varlen(
        "varlen", filled(VarlenArguments, options | {"query": q, "key": k, "value": v} | offsets)
    )


def paged(q: Any, pools: Any, tables: Any, lengths: Any, options: dict[str, Any]) -> Call:
    """The checked paged_attention call."""
    index = {"block_tables": tables, "kv_lengths": lengths}
    pages = dict(zip(("k_pages", "v_pages"), pools)) | {"draft_mask": None}
    return paged_validate.attention("paged", filled(PagedArguments, options | {"query": q} | pages | index))


def part_of(call: Call, position: Any) -> Call:
    """The checked call, as a part whose first query and first key lie at `position`."""
    spec, operands = call
    operands = operands | {"position": jnp.asarray(position, jnp.int32)}
    return dataclasses.replace(spec, operands=tuple(n for n in OPTIONAL if n in operands)), operands


def in_parts(q: Any, k: Any, v: Any, options: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    outs, lses = [], []
    for q0, q1 in pairwise(Q_CUTS):
        parts = []
        for k0, k1 in pairwise(K_CUTS):
            call = fixed(q[:, q0:q1], k[:, k0:k1], v[:, k0:k1], options)
            parts.append(attend(*part_of(call, (q0, k0))))
        out, lse = jax_flash.merge_attention(*map(list, zip(*parts)))
        outs.append(out)
        lses.append(lse)
    return jnp.concatenate(outs, 1), jnp.concatenate(lses, 2)


def whole(q: Any, k: Any, v: Any, options: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    return attend(*fixed(q, k, v, options))


def assert_close(got: Any, wanted: Any, limit: float = 1e-5) -> None:
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=limit, atol=limit)


@pytest.mark.parametrize("name", OPTIONS)
def test_parts_of_queries_and_keys_make_the_whole(name, implementation):
    q, k, v = tokens(0, HQ), tokens(1, HK), tokens(2, HK)
    options = options_of(name, implementation)
    parts, one = (jax.jit(lambda *qkv, f=f: f(*qkv, options))(q, k, v) for f in (in_parts, whole))
    assert_close(parts, one, 2e-5)


@pytest.mark.parametrize("name", ["window", "alibi causal softcap", "dropout", "deterministic"])
def test_gradients_of_parts_add_up_to_the_whole(name, implementation):
    arrays = tokens(0, HQ), tokens(1, HK), tokens(2, HK)
    dout, dlse = tokens(3, HQ), jax.random.normal(jax.random.key(4), (B, HQ, S))
    options = options_of(name, implementation)

    def loss(call):
        def of(*qkv):
            out, lse = call(*qkv, options)
            return (out * dout).sum() + jnp.where(lse > -jnp.inf, lse * dlse, 0).sum()

        return jax.jit(jax.grad(of, argnums=(0, 1, 2)))(*arrays)

    assert_close(loss(in_parts), loss(whole), 1e-4)


def test_a_part_that_sees_nothing_is_empty(implementation):
    q, k, v = tokens(0, HQ), tokens(1, HK), tokens(2, HK)
    options = options_of("causal", implementation)
    out, lse = attend(*part_of(fixed(q, k, v, options), (0, S)))
    assert not out.any()
    assert (lse == -jnp.inf).all()


def test_each_entry_of_a_mapped_axis_has_its_own_position(implementation):
    q, k, v = tokens(0, HQ, (3, B, 24)), tokens(1, HK, (3, B, 24)), tokens(2, HK, (3, B, 24))
    positions = jnp.asarray([[0, 0], [24, 0], [10, 20]], jnp.int32)
    options = options_of("alibi causal softcap", implementation)

    def call(q, k, v, position):
        return attend(*part_of(fixed(q, k, v, options), position))

    mapped = jax.vmap(call)(q, k, v, positions)
    one_by_one = [call(q[i], k[i], v[i], positions[i]) for i in range(3)]
    assert_close(mapped, jax.tree.map(lambda *x: jnp.stack(x), *one_by_one))


def test_packed_sequences_share_the_position(implementation):
    q, k, v = (tokens(i, h, (2 * S,)) for i, h in enumerate((HQ, HK, HK)))
    starts = jnp.asarray([0, 50, 2 * S], jnp.int32)
    options = DEFAULTS | {"causal": True, "implementation": implementation}
    call = varlen(q, k, v, starts, options)
    moved = attend(*part_of(call, (7, 3)))
    window = varlen(q, k, v, starts, options | {"causal": False, "window": (None, 4)})
    assert_close(moved, attend(*window))


@pytest.mark.parametrize("rows", [1, 12])
def test_pages_split_by_keys_make_the_whole(rows, implementation):
    """On GPUs, one row runs decode, and many run the forward over pages."""
    size, pages = 16, S // 16
    q, pools = tokens(0, HQ, (B, rows)), [tokens(i, HK, (B * pages, size)) for i in (1, 2)]
    tables = jnp.arange(B * pages, dtype=jnp.int32).reshape(B, pages)
    options = DEFAULTS | {
        "window": (50, 0), "page_layout": "nhd", "num_splits": None, "batch_invariant": False, "k_scale": None,
        "v_scale": None, "cu_seqlens_q": None, "value_dim": None, "alibi_slopes": np.full(HQ, 0.1, np.float32),
        "implementation": implementation,
    }  # fmt: skip

    def part(first_page: int, count: int) -> tuple[jax.Array, jax.Array]:
        lengths = jnp.full(B, count * size, jnp.int32)
        own = tables[:, first_page : first_page + count]
        call = paged(q, pools, own, lengths, options)
        return attend(*part_of(call, (S - rows, first_page * size)))

    part = jax.jit(part, static_argnums=(0, 1))
    outs, lses = zip(part(0, 2), part(2, pages - 2))
    assert_close(jax_flash.merge_attention(list(outs), list(lses)), part(0, pages), 2e-5)
    bottom = DEFAULTS | options | {"align": "bottom_right"}
    lengths = jnp.full(B, S, jnp.int32)
    assert_close(part(0, pages), attend(*paged(q, pools, tables, lengths, bottom)), 2e-5)


@pytest.mark.parametrize("rows", [1, 20])
def test_a_value_may_be_the_first_columns_of_its_key(rows, implementation):
    """As in multi-head latent attention: one pool, of which V is a view."""
    size, pages, dv = 16, 4, 8
    q, pool = tokens(0, HQ, (B, rows)), tokens(1, HK, (B * pages, size))
    tables = jnp.arange(B * pages, dtype=jnp.int32).reshape(B, pages)
    lengths = jnp.asarray([size * pages, 37], jnp.int32)
    options = DEFAULTS | {
        "causal": True, "align": "bottom_right", "page_layout": "nhd", "num_splits": None, "batch_invariant": False,
        "k_scale": None, "v_scale": None, "cu_seqlens_q": None, "value_dim": None, "implementation": implementation,
    }  # fmt: skip

    def shared(q, pool):
        spec, operands = paged(q, (pool, pool), tables, lengths, options)
        return attend(dataclasses.replace(spec, value_dim=dv), operands)

    def apart(q, pool):
        return attend(*paged(q, (pool, pool[..., :dv]), tables, lengths, options))

    assert_close(shared(q, pool), apart(q, pool))
    gradients = [
        jax.jit(jax.grad(lambda q, x, f=f: f(q, x)[0].sum(), (0, 1)))(q, pool) for f in (shared, apart)
    ]
    assert_close(*gradients)
    moved = jnp.cos(q), jnp.sin(pool)
    assert_close(*(jax.jit(lambda *x, f=f: jax.jvp(f, (q, pool), x)[1])(*moved) for f in (shared, apart)))
