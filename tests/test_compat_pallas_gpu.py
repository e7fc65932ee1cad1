"""jax_flash.compat.pallas_gpu: JAX's mha and paged_attention for Pallas on GPUs, against numpy and against JAX."""

import importlib
import re
import warnings

import jax
import jax.numpy as jnp
import masked_reference
import numpy as np
import pytest
from flash_attn_reference import assert_close, i32, normal, slope
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from programs import require_devices

from jax_flash.compat import pallas_gpu
from jax_flash.compat.costs import CostWarning

pytestmark = pytest.mark.usefixtures("exact_products")

LOG2_E = np.log2(np.e)
Q, K, V = normal(0, 2, 12, 4, 16), normal(1, 2, 12, 4, 16), normal(2, 2, 12, 4, 16)
IDS = i32([0] * 5 + [1] * 7, [3] * 2 + [0] * 10)
CAUSAL = np.tri(12, dtype=bool)
SAME = (IDS[:, None, :, None] == IDS[:, None, None, :]) & np.ones((2, 1, 12, 12), bool)
CALLS = {
    "plain": ({}, True),
    "causal": (dict(causal=True), CAUSAL),
    "scale": (dict(sm_scale=0.3), True),
    "segments": (dict(segment_ids=IDS), SAME),
    "causal segments": (dict(segment_ids=IDS, causal=True, sm_scale=0.25), SAME & CAUSAL),
}
PAGES, PS, D = 10, 4, 16
TABLES, ENDS = i32([9, 4, 0], [3, -7, 99], [1, 7, 2]), i32(9, 4, 12)
POOLS = normal(3, 2, PAGES, PS, D), normal(4, 2, PAGES, PS, D)
TOKENS = normal(5, 3, 8, D)


def jax_own(name):
    """JAX's module. JAX warns that it will be removed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(f"jax.experimental.pallas.ops.gpu.{name}")
        except ImportError as e:
            pytest.skip(str(e))


def call(options, *arrays, **more):
    options = dict(segment_ids=None) | options
    return pallas_gpu.mha(*arrays, options.pop("segment_ids"), **options, **more)


@pytest.mark.parametrize("name", CALLS)
def test_mha_is_the_equations(name, implementation):
    options, seen = CALLS[name]
    out, residual = call(options, Q, K, V, return_residuals=True, implementation=implementation)
    right, lse = masked_reference.attend(Q, K, V, seen, scale=options.get("sm_scale", 1.0))
    assert_close(out, right)
    assert_close(residual, lse * LOG2_E)


def test_mha_counts_from_the_top_left_and_takes_grouped_heads(implementation):
    k, v = K[:, :7, :2], V[:, :7, :2]
    out = call(dict(causal=True), Q, k, v, implementation=implementation)
    assert_close(out, masked_reference.attend(Q, k, v, np.tri(12, 7, dtype=bool), scale=1.0)[0])


def test_mha_is_jax_s_own():
    own = jax_own("attention")
    given = dict(segment_ids=IDS, causal=True, sm_scale=0.7)
    assert_close(call(given, Q, K, V), own.mha_reference(Q, K, V, **given))
    given |= dict(return_residuals=True)
    for got, right in zip(call(given, Q, K, V), own.mha(Q, K, V, **given, interpret=True), strict=True):
        assert_close(got, np.asarray(right))


def test_mha_differentiates():
    options, seen = CALLS["causal segments"]

    def loss(q, k, v):
        out, residual = call(options, q, k, v, return_residuals=True)
        return jnp.sin(out).sum() + residual.sum()

    def right(q, k, v):
        out, lse = masked_reference.attend(q, k, v, seen, scale=0.25)
        return np.sin(out).sum() + lse.sum() * LOG2_E

    wanted, along = slope(right, (Q, K, V))
    got = sum((g * u).sum() for g, u in zip(jax.grad(loss, (0, 1, 2))(Q, K, V), along))
    assert_close(got, wanted, 1e-4)


def test_what_tunes_pallas_has_no_effect():
    tuned = pallas_gpu.mha(
        Q, K, V, None, 1.0, False, pallas_gpu.BlockSizes.get_default(), "xla", 4, 2, (1, 2, 3), True, True
    )
    assert np.array_equal(tuned, pallas_gpu.mha(Q, K, V, None))
    with pytest.raises(ValueError, match=r"^mha: backward_pass_impl must be"):
        pallas_gpu.mha(Q, K, V, None, backward_pass_impl="cuda")


# --- pages -----------------------------------------------------------------------------------------------------------


def gathered(pool, tables=TABLES):
    """[n, keys, hk, d]; pages that no sequence needs are zeros."""
    tables = np.where((tables >= 0) & (tables < PAGES), tables, PAGES)
    pool = np.pad(np.asarray(pool, float), ((0, 0), (0, 1), (0, 0), (0, 0)))
    return pool[:, tables].transpose(1, 2, 3, 0, 4).reshape(len(tables), -1, 2, pool.shape[-1])


def right_of_pages(q, k, v, ends=ENDS, **options):
    seen = (np.arange(12) < ends[:, None])[:, None, None]
    return masked_reference.attend(q[:, None], gathered(k), gathered(v), seen, scale=1.0, **options)[0][:, 0]


@pytest.mark.parametrize("cap", [None, 1.5])
def test_paged_attention_is_the_equations(cap, implementation):
    out = pallas_gpu.paged_attention(
        TOKENS, *POOLS, TABLES, ENDS, attn_logits_soft_cap=cap, implementation=implementation
    )
    assert_close(out, right_of_pages(TOKENS, *POOLS, softcap=cap))


def test_paged_attention_without_lengths_reads_whole_tables(implementation):
    full = i32([9, 4, 0], [3, 8, 8], [1, 7, 2])
    right = masked_reference.attend(TOKENS[:, None], *(gathered(x, full) for x in POOLS), scale=1.0)[0][:, 0]
    got = pallas_gpu.paged_attention(TOKENS, *POOLS, full, None, implementation=implementation)
    assert_close(got, right)


def test_paged_attention_is_jax_s_own():
    own = jax_own("paged_attention")
    tables = i32([9, 4, 0], [3, 8, 6], [1, 7, 2])
    given = dict(attn_logits_soft_cap=2.0)
    got = pallas_gpu.paged_attention(TOKENS, *POOLS, tables, i32(9, 0, 12), **given)
    right = own.paged_attention(
        TOKENS, *POOLS, tables, i32(9, 0, 12), **given, k_splits=3, pages_per_compute_block=1, interpret=True
    )
    assert_close(got, np.asarray(right))


def quantised(dtype):
    """Pools of a dtype, and the scale of each token."""
    largest = 127.0 if dtype == jnp.int8 else 448.0
    found = []
    for pool in POOLS:
        scale = (np.abs(pool).max(-1) / largest).astype(np.float32)
        x = pool / scale[..., None]
        found.append((jnp.asarray(np.rint(x) if dtype == jnp.int8 else x).astype(dtype), scale))
    return zip(*found)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_scales_of_tokens_are_those_of_pages_of_one_token(dtype, implementation):
    pools, scales = quantised(dtype)
    exact = [np.asarray(x, np.float32) * s[..., None] for x, s in zip(pools, scales)]
    out = pallas_gpu.paged_attention(TOKENS, *pools, TABLES, ENDS, *scales, implementation=implementation)
    assert_close(out, right_of_pages(TOKENS, *exact))
    keys_only = pallas_gpu.paged_attention(
        TOKENS, *pools, TABLES, ENDS, scales[0], implementation=implementation
    )
    values = np.asarray(pools[1], np.float32)
    assert_close(keys_only / 448, right_of_pages(TOKENS, exact[0], values) / 448)


@pytest.mark.parametrize("which", ["int8", "keys only"])
def test_what_no_kernel_reads_is_dequantised_with_a_warning(which):
    dtype = jnp.int8 if which == "int8" else jnp.float8_e4m3fn
    pools, scales = map(list, quantised(dtype))
    if which == "keys only":
        pools[1], scales[1] = POOLS[1], None
    exact = [np.asarray(x, np.float32) * (1 if s is None else s[..., None]) for x, s in zip(pools, scales)]
    with pytest.warns(
        CostWarning, match=r"^pallas_gpu.paged_attention: k_pages is .*float32, 10 KiB; float8"
    ):
        out = pallas_gpu.paged_attention(TOKENS, *pools, TABLES, ENDS, *scales)
    assert_close(out, right_of_pages(TOKENS, *exact))


def test_a_page_outside_the_pool_is_no_page_of_another_head(implementation):
    """The index of such a token overflows int32, in a table of pages and in one of tokens."""
    pools, scales = quantised(jnp.float8_e4m3fn)
    tables = i32([9, 4, 0], [3, 2**30, 99], [1, 7, 2])
    for arrays, of_tokens in ((POOLS, ()), (pools, scales)):
        out = pallas_gpu.paged_attention(
            TOKENS, *arrays, tables, i32(9, 5, 12), *of_tokens, implementation=implementation
        )
        assert np.isnan(out).all((1, 2)).tolist() == [False, True, False]
        assert np.isnan(out).any((1, 2)).tolist() == [False, True, False]


def test_what_is_past_a_length_is_not_read(implementation):
    used = np.zeros((PAGES, PS), bool)
    for row, end in zip(TABLES, ENDS):
        used[row[np.arange(end) // PS], np.arange(end) % PS] = True
    poisoned = [np.where(used[..., None], x, np.nan) for x in POOLS]
    got, right = (
        pallas_gpu.paged_attention(TOKENS, *x, TABLES, ENDS, implementation=implementation)
        for x in (poisoned, POOLS)
    )
    assert np.array_equal(got, right)


def test_paged_attention_differentiates():
    def loss(q, k, v):
        return jnp.sin(pallas_gpu.paged_attention(q, k, v, TABLES, ENDS)).sum()

    wanted, along = slope(lambda *x: np.sin(right_of_pages(*x)).sum(), (TOKENS, *POOLS))
    got = sum((g * u).sum() for g, u in zip(jax.grad(loss, (0, 1, 2))(TOKENS, *POOLS), along))
    assert_close(got, wanted, 1e-4)


def test_pools_split_over_their_heads_are_not_gathered(kernel):
    """Each device keeps its own head's pages, as tensor-parallel serving has them."""
    require_devices(2)
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    place = NamedSharding(mesh, PartitionSpec("heads"))
    pools = [jax.device_put(x, place) for x in POOLS]
    run = jax.jit(lambda q, k, v: pallas_gpu.paged_attention(q, k, v, TABLES, ENDS, implementation=kernel))
    assert_close(run(TOKENS, *pools), right_of_pages(TOKENS, *POOLS))
    q = jax.device_put(TOKENS, NamedSharding(mesh, PartitionSpec(None, "heads")))
    assert "all-gather" not in run.lower(q, *pools).compile().as_text()


@pytest.mark.parametrize("parts", ["queries", "pools", "one pool"])
def test_explicit_axes_may_split_heads_of_some_arrays_alone(parts, kernel):
    require_devices(4)
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    q, k, v = {
        "queries": ((None, ("x", "y")), (), ()),  # KV heads cannot be split in four
        "pools": ((), ("x",), ("x",)),
        "one pool": ((None, "y"), ("x",), (None, "x")),
    }[parts]

    def loss(*arrays):
        out = pallas_gpu.paged_attention(*arrays, TABLES, ENDS, implementation=kernel)
        return jnp.sin(out).sum(), out

    run = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    wanted = run(TOKENS, *map(jnp.asarray, POOLS))
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
            for x, spec in zip((TOKENS, *POOLS), (q, k, v))
        ]
        for got in (run(*placed), jax.jit(run)(*placed)):
            jax.tree.map(assert_close, got, wanted)


ERRORS = {
    "other pools": (
        lambda: pallas_gpu.paged_attention(TOKENS, POOLS[0], POOLS[1][:1], TABLES, ENDS),
        "v_pages must have shape [hk, p, ps, d] = (2, 10, 4, 16), got (1, 10, 4, 16)",
    ),
    "heads": (
        lambda: pallas_gpu.paged_attention(TOKENS[:, :3], *POOLS, TABLES, ENDS),
        "k_pages has 2 heads, which does not divide q's 3",
    ),
    "head dim": (
        lambda: pallas_gpu.paged_attention(TOKENS[..., :8], *POOLS, TABLES, ENDS),
        "k_pages has head dim 16, which differs from q's 8",
    ),
    "tables": (
        lambda: pallas_gpu.paged_attention(TOKENS, *POOLS, TABLES[:2], ENDS),
        "block_tables must have shape [n, pages] = (3, 3), got (2, 3)",
    ),
    "one table": (
        lambda: pallas_gpu.paged_attention(TOKENS, *POOLS, TABLES[0], ENDS),
        "block_tables must have rank 2 [n pages], got shape (3,)",
    ),
    "scales": (
        lambda: pallas_gpu.paged_attention(TOKENS, *POOLS, TABLES, ENDS, np.ones((2, 10), np.float32)),
        "k_scales_pages must have shape [hk, p, ps] = (2, 10, 4), got (2, 10)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match="^pallas_gpu.paged_attention: " + re.escape(message)):
        call()
