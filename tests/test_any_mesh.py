"""Any sizes on any mesh: under jit, sharded arrays give the results and the gradients that one device gives.

Sizes include 0 and 1, and heads that no axis divides. Each mesh axis splits batch, heads, sequence, pages or nothing,
through the arguments' shardings or a constraint. JAX_FLASH_TEST_EXAMPLES and JAX_FLASH_TEST_SEED choose other cases.
"""

import contextlib
import os
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, make_inputs, varlen
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from pages import require
from programs import assert_same, attention, require_devices, with_gradients

from jax_flash import append_kv, paged_attention
from jax_flash.operands import dims_of

EXAMPLES = int(os.environ.get("JAX_FLASH_TEST_EXAMPLES", 4))  # per layout
SEED = 1000 * int(os.environ.get("JAX_FLASH_TEST_SEED", 0))

MESHES = ((2,), (3,), (4,), (5,), (7,), (1, 3), (2, 3), (2, 2), (2, 1))
SIZES = (0, 1, 2, 3, 4, 5, 6, 12)
HEADS = ((1, 1), (2, 1), (5, 1), (8, 1), (16, 1), (71, 1), (5, 5), (6, 2), (6, 3), (12, 3), (15, 5))
ROLES = {  # the names of the dimensions that an axis of the mesh may split
    "batch": ("b", "n"),
    "heads": ("hq", "hk"),
    "sequence": ("sq", "sk", "tq", "tk", "s", "t"),
    "queries": ("sq", "tq"),
    "pages": ("p",),
    "head dim": ("d", "dv"),
    "nothing": (),
}


@dataclass
class Problem:
    """A call of named arrays, with the names of the dimensions that may be split."""

    call: object
    arrays: dict
    dims: dict = field(repr=False)


def fixed(rng, implementation):
    b, sq, sk = (int(rng.choice(SIZES)) for _ in range(3))
    hq, hk = HEADS[rng.integers(len(HEADS))]
    case = Case(
        "fixed", b=b, sq=sq, sk=sk if rng.random() < 0.5 else sq, hq=hq, hk=hk, d=8, dv=8,
        causal=bool(rng.random() < 0.6), sinks=bool(rng.random() < 0.3),
        dropout_rate=float(rng.choice([0.0, 0.0, 0.4])),
    )  # fmt: skip
    if rng.random() < 0.3:
        case = case.replace(bias=tuple(int(rng.choice([1, size])) for size in (b, hq, sq, case.sk)))
    return dense(case, implementation, "fixed")


def packed(rng, implementation):
    lengths = tuple(int(x) for x in rng.integers(0, 7, rng.integers(0, 4)))
    hq, hk = HEADS[rng.integers(len(HEADS))]
    total = sum(lengths)
    case = varlen(
        "packed", lengths, hq=hq, hk=hk, d=8, dv=8, causal=bool(rng.random() < 0.6),
        padding=(int(rng.choice([0, -total % 6])), int(rng.choice([0, -total % 12]))),
    )  # fmt: skip
    problem = dense(case, implementation, "varlen")
    # Queries and keys share one array of offsets.
    if case.padding[0] == case.padding[1] and rng.random() < 0.7:
        del problem.arrays["cu_seqlens_k"]
        call = problem.call
        problem.call = lambda arrays: call(arrays | {"cu_seqlens_k": None})
    return problem


def dense(case, implementation, layout):
    inputs = make_inputs(case)
    return Problem(
        attention(case, implementation), inputs.positional | inputs.keywords, dims_of(layout, "nhd")
    )


def paged(rng, implementation):
    n, sq, pages, size = (int(rng.choice(x)) for x in (SIZES, SIZES, SIZES, (1, 2, 3)))
    hq, hk = HEADS[rng.integers(len(HEADS))]
    latent, layout = rng.random() < 0.3, str(rng.choice(["nhd", "hnd"]))
    packed = rng.random() < 0.3
    hk = 1 if latent else hk
    pool = (pages, size, hk, 16) if layout == "nhd" else (pages, hk, size, 16)
    columns = int(rng.choice([0, 1, 3])) if pages else 0
    arrays = {
        "query": normal(rng, (n * sq, hq, 16) if packed else (n, sq, hq, 16)),
        "key": normal(rng, pool),
        "block_tables": integers(rng, 0, max(pages, 1), (n, columns)),
        "kv_lengths": integers(rng, 0, columns * size + 1, n),
    }
    if packed:
        arrays["cu_seqlens_q"] = jnp.arange(n + 1, dtype=jnp.int32) * sq
    if not latent:
        arrays["value"] = normal(rng, pool)
    options = dict(
        causal=bool(rng.random() < 0.6), page_layout=layout, value_dim=8 if latent else None,
        return_lse=True, implementation=implementation,
    )  # fmt: skip

    def call(arrays):
        x = dict(arrays)
        first = [x.pop(name, None) for name in ("query", "key", "value", "block_tables", "kv_lengths")]
        return paged_attention(*first, **x, **options)

    return Problem(call, arrays, dims_of("paged_varlen" if packed else "paged", layout))


def append(rng, implementation):
    n, s, pages, hk = (int(rng.choice(x)) for x in (SIZES, SIZES, SIZES, (1, 2, 3, 5, 12)))
    packed, size, columns = rng.random() < 0.3, 2, int(rng.choice([0, 1, 3]))
    rows = (n * s, hk, 8) if packed else (n, s, hk, 8)
    order = rng.permutation(max(pages, n * columns, 1))[: n * columns]  # no page occurs twice
    arrays = {
        "k_pages": normal(rng, (pages, size, hk, 8)),
        "v_pages": normal(rng, (pages, size, hk, 8)),
        "key": normal(rng, rows),
        "value": normal(rng, rows),
        "block_tables": jnp.asarray(order.reshape(n, columns), jnp.int32),
        "kv_lengths": integers(rng, 0, columns * size + 1, n),
    }
    if packed:
        arrays["cu_seqlens"] = jnp.arange(n + 1, dtype=jnp.int32) * s
    call = partial(append_kv, implementation=implementation)
    dims = dims_of("append_varlen" if packed else "append", "nhd")
    return Problem(lambda arrays: call(**arrays), arrays, dims)


def normal(rng, shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def integers(rng, low, high, shape):
    return jnp.asarray(rng.integers(low, high, shape), jnp.int32)


def specs_of(rng, problem, mesh, uneven):
    """A PartitionSpec for each array. Axes split dimensions that they divide or, if `uneven`, any dimension."""
    roles = {axis: str(rng.choice(list(ROLES))) for axis in mesh.axis_names}
    specs = {}
    for name, x in problem.arrays.items():
        left_whole = rng.random() < 0.15
        entries = []
        for dim, size in zip(problem.dims.get(name, ()), getattr(x, "shape", ())):
            axes = [a for a, role in roles.items() if dim.rstrip("*") in ROLES[role] and a not in entries]
            axes = [a for a in axes if uneven or size % mesh.shape[a] == 0][: 0 if left_whole else 1]
            entries.append(axes[0] if axes else None)
        specs[name] = P(*entries)
    return specs


def check(problem, mesh, specs, uneven):
    """Sharded arguments, or with `uneven` whole ones under a sharding constraint, give what one device gives."""
    differentiable = "k_pages" not in problem.arrays
    run = with_gradients(problem.call) if differentiable else problem.call
    wanted = jax.jit(run)(problem.arrays)
    sharding = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    explicit = AxisType.Explicit in mesh.axis_types
    with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
        if uneven:
            arrays = problem.arrays
            got = jax.jit(lambda arrays: run(jax.lax.with_sharding_constraint(arrays, sharding)))(arrays)
        else:
            got = jax.jit(run)(
                {name: jax.device_put(x, sharding[name]) for name, x in problem.arrays.items()}
            )
    assert_same(jax.device_get(got), jax.device_get(wanted))


@pytest.mark.parametrize("example", range(EXAMPLES))
@pytest.mark.parametrize("make", [fixed, packed, paged, append], ids=lambda make: make.__name__)
def test_a_random_call_on_a_random_mesh(kernel, make, example):
    require(kernel)
    rng = np.random.default_rng([SEED, example, *make.__name__.encode()])
    shape = MESHES[rng.integers(len(MESHES))]
    kind, uneven = [(AxisType.Auto, False), (AxisType.Explicit, False), (AxisType.Auto, True)][example % 3]
    count = int(np.prod(shape))
    require_devices(count)
    mesh = jax.make_mesh(shape, ("x", "y")[: len(shape)], (kind,) * len(shape), devices=jax.devices()[:count])
    problem = make(rng, "xla" if rng.random() < 0.2 else kernel)
    specs = specs_of(rng, problem, mesh, uneven)
    print(
        mesh.shape,
        kind,
        "uneven" if uneven else "",
        {n: (x.shape, specs[n]) for n, x in problem.arrays.items()},
    )
    check(problem, mesh, specs, uneven)
