"""jax_flash.compat.pallas_tpu.paged_attention against float64 numpy and against JAX's reference."""

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

from jax_flash.compat import pallas_gpu, pallas_tpu
from jax_flash.compat.costs import CostWarning

pytestmark = pytest.mark.usefixtures("exact_products")

N, HK, PAGES, PS, D = 4, 2, 10, 4, 16
TABLES, ENDS = i32([9, 4, 0], [3, -7, 99], [1, 7, 2], [2**30, 8, 6]), i32(9, 4, 12, 0)
POOLS = normal(3, HK, PAGES, PS, D), normal(4, HK, PAGES, PS, D)
TOKENS = normal(5, N, 8, D)
DTYPES = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}


def attend(q, k, v, ends=ENDS, tables=TABLES, **options):
    return pallas_tpu.paged_attention(q, k, v, ends, tables, **options)


def gathered(pool, tables=TABLES):
    """[n, keys, hk, d]; pages outside the pool are zeros."""
    tables = np.where((tables >= 0) & (tables < PAGES), tables, PAGES)
    pool = np.pad(np.asarray(pool, float), ((0, 0), (0, 1), (0, 0), (0, 0)))
    return pool[:, tables].transpose(1, 2, 3, 0, 4).reshape(len(tables), -1, len(pool), pool.shape[-1])


def right(q, k, v, ends=ENDS, **options):
    seen = (np.arange(TABLES.shape[1] * PS) < ends[:, None])[:, None, None]
    q = np.asarray(q, float)[:, None]
    return masked_reference.attend(q, gathered(k), gathered(v), seen, scale=1.0, **options)[0][:, 0]


def jax_own(name):
    try:
        return importlib.import_module(f"jax.experimental.pallas.ops.tpu.paged_attention.{name}")
    except ImportError as e:
        pytest.skip(str(e))


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("heads", [(2, 2), (8, 2), (5, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_equations(dtype, heads, cap, implementation):
    hq, hk = heads
    arrays = [jnp.asarray(x, dtype) for x in (TOKENS[:, :hq], *(pool[:hk] for pool in POOLS))]
    out = attend(*arrays, attn_logits_soft_cap=cap, implementation=implementation)
    assert out.dtype == dtype
    assert not out[3].any()
    wanted = right(*(np.asarray(x, float) for x in arrays), softcap=cap)
    assert_close(out.astype(jnp.float32), wanted, DTYPES[dtype])


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_jax_s_own(dtype, cap, implementation):
    q, k, v = (jnp.asarray(x, dtype) for x in (TOKENS, *POOLS))
    used = np.clip(TABLES, 0, PAGES - 1)
    keys, values = (
        jnp.asarray(np.asarray(x, np.float32)[:, used], dtype).swapaxes(0, 1).reshape(N, HK, -1, D)
        for x in (k, v)
    )
    own = jax_own("util").grouped_query_attention_reference(q, keys, values, jnp.asarray(ENDS), cap)
    out = attend(q, k, v, attn_logits_soft_cap=cap, implementation=implementation)
    assert_close(out[:3].astype(jnp.float32), np.asarray(own[:3], np.float32), DTYPES[dtype])


def quantised(dtype):
    """Pools as JAX quantises them, and what they stand for; float8 weights have the same kind of scales."""
    found = []
    for pool in POOLS:
        if dtype == "int8":
            x = jax_own("quantization_utils").quantize_to_int8(jnp.asarray(pool))
        else:
            scales = np.abs(pool).max(-1, keepdims=True)
            x = pallas_tpu.QuantizedTensor(jnp.asarray(pool / scales * 200).astype(dtype), scales)
        exact = np.asarray(x.weight, np.float32) * np.asarray(x.scales) / 127.5
        found.append((x, exact))
    return zip(*found)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_weights_are_read_as_they_are(dtype, implementation):
    pools, exact = quantised(dtype)
    with warnings.catch_warnings(), jax.numpy_rank_promotion("raise"):
        warnings.simplefilter("error")
        out = attend(TOKENS, *pools, implementation=implementation)
    assert_close(out, right(TOKENS, *exact), 2e-5)
    bare = [x.weight for x in pools]
    alone = attend(TOKENS / 128, *bare, implementation=implementation)
    wanted = right(TOKENS / 128, *(np.asarray(x, np.float32) for x in bare))
    assert_close(alone / 448, wanted / 448)


@pytest.mark.parametrize("which", ["int8", "by element", "keys only"])
def test_what_no_kernel_reads_is_dequantised_with_a_warning(which):
    pools, exact = map(list, quantised("int8" if which == "int8" else "float8_e4m3fn"))
    if which == "by element":
        pools = [x._replace(scales=np.broadcast_to(x.scales, x.weight.shape)) for x in pools]
    if which == "keys only":
        pools[1], exact[1] = POOLS[1], POOLS[1]
    message = r"^pallas_tpu.paged_attention: k_pages is .* stores both as float32, 10 KiB; float8 pools"
    with pytest.warns(CostWarning, match=message):
        out = attend(TOKENS, *pools)
    assert_close(out, right(TOKENS, *exact), 2e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dequantised_keys_are_not_rounded_to_16_bits(dtype):
    """Scores of unscaled queries are large, and so are the differences that rounding their keys would make."""
    pools, exact = quantised("int8")
    q = jnp.asarray(8 * TOKENS, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CostWarning)
        out = attend(q, *pools)
    assert out.dtype == dtype
    assert_close(out.astype(jnp.float32), right(q, *exact), float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("dtype", ["float32", "float8_e4m3fn"])
def test_a_page_outside_the_pool_is_no_page_of_another_head(dtype, implementation):
    pools = POOLS if dtype == "float32" else next(quantised(dtype))
    out = attend(TOKENS, *pools, i32(9, 5, 12, 1), implementation=implementation)
    assert np.isnan(out).all((1, 2)).tolist() == [False, True, False, True]
    assert np.isnan(out).any((1, 2)).tolist() == [False, True, False, True]


def test_what_is_past_a_length_is_not_read(implementation):
    used = np.zeros((PAGES, PS), bool)
    for row, end in zip(TABLES, ENDS):
        used[row[np.arange(end) // PS], np.arange(end) % PS] = True
    poisoned = [np.where(used[..., None], x, np.nan) for x in POOLS]
    got, wanted = (attend(TOKENS, *x, implementation=implementation) for x in (poisoned, POOLS))
    assert np.array_equal(got, wanted)


def test_it_differentiates():
    wanted, along = slope(lambda *x: np.sin(right(*x)).sum(), (TOKENS, *POOLS))
    loss = jax.grad(lambda *x: jnp.sin(attend(*x)).sum(), (0, 1, 2))
    assert_close(sum((g * u).sum() for g, u in zip(loss(TOKENS, *POOLS), along)), wanted, 1e-4)


def test_pools_are_neither_transposed_nor_copied(kernel):
    q, pool = (jax.ShapeDtypeStruct(x, jnp.float32) for x in ((2, 8, 64), (4, 300, 16, 64)))
    run = jax.jit(lambda *x: attend(*x, i32(5, 16), i32([7], [299]), implementation=kernel))
    memory = run.lower(q, pool, pool).compile().memory_analysis()
    assert memory.temp_size_in_bytes < pool.size  # a quarter of a pool's bytes


@pytest.mark.parametrize("of_q", ["split", "whole"])
@pytest.mark.parametrize("function", ["pallas_tpu", "pallas_gpu"])
@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
def test_pools_split_over_their_heads_are_not_gathered(axes, function, of_q, kernel):
    require_devices(2)
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(axes,), devices=jax.devices()[:2])

    def run(q, k, v):
        if function == "pallas_gpu":
            return pallas_gpu.paged_attention(q, k, v, TABLES, ENDS, implementation=kernel)
        return attend(q, k, v, implementation=kernel)

    pools = [jax.device_put(x, NamedSharding(mesh, PartitionSpec("heads"))) for x in POOLS]
    spec = PartitionSpec(None, "heads") if of_q == "split" else PartitionSpec()
    q = jax.device_put(TOKENS, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh) if axes == AxisType.Explicit else warnings.catch_warnings():
        assert_close(jax.jit(run)(q, *pools), right(TOKENS, *POOLS))
        text = jax.jit(run).lower(q, *pools).compile().as_text()
    assert of_q == "whole" or "all-gather" not in text
    assert "f32[2,10,4,16]" not in text  # the whole pool, of which each device has one head


def test_what_tunes_tpus_has_no_effect():
    tuned = attend(
        TOKENS,
        *POOLS,
        mask_value=-1.0,
        pages_per_compute_block=2,
        megacore_mode="batch",
        inline_seq_dim=False,
    )
    assert np.array_equal(tuned, attend(TOKENS, *POOLS))


def quantised_by(scales):
    return pallas_tpu.QuantizedTensor(np.ones((HK, PAGES, PS, D), np.int8), np.ones(scales, np.float32))


ERRORS = {
    "other pools": (
        lambda: attend(TOKENS, POOLS[0], POOLS[1][:1]),
        "v_pages must have shape [hk, p, ps, d] = (2, 10, 4, 16), got (1, 10, 4, 16)",
    ),
    "heads": (lambda: attend(TOKENS[:, :3], *POOLS), "k_pages has 2 heads, which does not divide q's 3"),
    "head dim": (
        lambda: attend(TOKENS[..., :8], *POOLS),
        "k_pages has head dim 16, which differs from q's 8",
    ),
    "tables": (
        lambda: attend(TOKENS, *POOLS, tables=TABLES[:2]),
        "page_indices must have shape [n, pages] = (4, 3), got (2, 3)",
    ),
    "lengths": (lambda: attend(TOKENS, *POOLS, ENDS[:2]), "lengths must have shape [n] = (4,), got (2,)"),
    "no lengths": (lambda: attend(TOKENS, *POOLS, None), "lengths must be an array, got None"),
    "dtype": (
        lambda: attend(TOKENS.astype(int), *POOLS),
        "q has dtype int32, allowed are float16, bfloat16, float32",
    ),
    "integers": (
        lambda: attend(TOKENS, *(x.astype(np.int8) for x in POOLS)),
        "k_pages has dtype int8, allowed are float32 (as q), float8_e4m3fn and float8_e5m2",
    ),
    "scales": (
        lambda: attend(TOKENS, quantised_by((HK, PAGES, PS)), POOLS[1]),
        "k_pages.scales must have shape [hk, p, ps, 1 or d] = (2, 10, 4, 16), got (2, 10, 4)",
    ),
    "megacore": (
        lambda: attend(TOKENS, *POOLS, megacore_mode="heads"),
        "megacore_mode must be one of ('batch', 'kv_head'), got 'heads'",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name):
    call, message = ERRORS[name]
    with pytest.raises((ValueError, TypeError), match="^pallas_tpu.paged_attention: " + re.escape(message)):
        call()
