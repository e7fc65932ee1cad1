"""compat.easydel against ejkernel's equations in numpy, and against ejkernel and EasyDeL where they are installed."""

import types
from functools import partial

import jax
import jax.numpy as jnp
import masked_reference
import numpy as np
import pytest
from flash_attn_reference import assert_close, i32, normal, slope
from jax.sharding import PartitionSpec
from programs import require_devices

from jax_flash.compat import easydel
from jax_flash.compat.easydel import flash_attention, scaled_dot_product_attention

B, S, HQ, HK, D = 2, 24, 4, 2, 16
Q, K, V = normal(0, B, S, HQ, D), normal(1, B, S, HK, D), normal(2, B, S, HK, D)
BIAS = normal(3, B, HQ, S, S)
ROW, KEY = np.arange(S)[:, None], np.arange(S)
IDS = i32([0] * 10 + [1] * 10 + [-1] * 4, [0] * 24)
SAME = ((IDS[:, :, None] == IDS[:, None]) & (IDS >= 0)[:, None])[:, None]
DENSE = np.random.default_rng(4).random((B, 1, S, S)) < 0.6


class MaskInfo(types.SimpleNamespace):
    """The fields of ejkernel's MaskInfo that the adapter reads."""

    def __init__(self, mask=None, ids=None, computed=None):
        super().__init__(_attention_mask=mask, _q_segment_ids=ids, _kv_segment_ids=None, computed=computed)

    def get_or_compute_segment_ids(self, per_head):
        assert not per_head
        return self._q_segment_ids, self._q_segment_ids

    def get_or_compute_attention_mask(self):
        return self.computed


CALLS = {
    "plain": ({}, True),
    "causal": (dict(causal=True), ROW >= KEY),
    "window": (dict(causal=True, sliding_window=(5, 0)), (ROW >= KEY) & (ROW - KEY <= 5)),
    "window of one number": (dict(sliding_window=3), np.abs(ROW - KEY) <= 3),
    "window of NumPy's number": (dict(sliding_window=np.int64(3)), np.abs(ROW - KEY) <= 3),
    "scale": (dict(softmax_scale=0.4), True),
    "cap": (dict(logits_soft_cap=1.5), True),
    "mask": (dict(mask_info=MaskInfo(DENSE)), DENSE),
    "mask of integers": (dict(mask_info=MaskInfo(DENSE[:, 0].astype(np.int32))), DENSE),
    "mask of keys": (dict(mask_info=MaskInfo(DENSE[:, 0, 0])), DENSE[:, :, :1]),
    "mask that is computed": (dict(mask_info=MaskInfo(computed=DENSE)), DENSE),
    "segments": (dict(mask_info=MaskInfo(ids=IDS), causal=True), SAME & (ROW >= KEY)),
    "segments and mask": (dict(mask_info=MaskInfo(DENSE, IDS)), SAME & DENSE),
    "offsets with a mask": (dict(mask_info=MaskInfo(DENSE)), DENSE),
}


def right(options, seen, q=Q, k=K, v=V, **scores):
    cap, scale = options.get("logits_soft_cap"), options.get("softmax_scale")
    return masked_reference.attend(q, k, v, seen, softcap=cap, scale=scale, bias_first=True, **scores)[0]


@pytest.mark.parametrize("name", CALLS)
def test_the_function_is_the_equations(name, implementation):
    options, seen = CALLS[name]
    call = partial(flash_attention, Q, K, V, implementation=implementation, **options)
    offsets = i32(0, 10, 24) if name == "offsets with a mask" else None
    assert_close(call(None, offsets, offsets), right(options, seen))
    assert_close(call(BIAS), right(options, seen, bias=BIAS))


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("cap", "offsets with a mask")])
def test_scaled_dot_products_are_the_equations(name, implementation):
    options, seen = CALLS[name]
    if name == "segments and mask":  # if there is a mask, the function ignores segments
        seen = DENSE
    call = partial(scaled_dot_product_attention, Q, K, V, implementation=implementation, **options)
    assert_close(call(BIAS), right(options, seen, bias=BIAS))
    assert_close(call(init_bias=lambda: BIAS), right(options, seen, bias=BIAS))


def test_scaled_dot_products_have_lengths():
    out = scaled_dot_product_attention(Q, K, V, None, i32(24, 7), i32(9, 24), causal=True)
    seen = (ROW >= KEY) & (i32(9, 24)[:, None, None, None] > KEY) & (i32(24, 7)[:, None, None, None] > ROW)
    assert_close(out, right({}, seen))


@pytest.mark.parametrize("shape", [(3,), (1, 3), (HQ, 2)])
def test_all_sinks_of_a_head_count(shape):
    aux = normal(5, *shape)
    sinks = np.log(np.exp(np.broadcast_to(aux, (HQ, shape[-1])).astype(float)).sum(-1))
    assert_close(flash_attention(Q, K, V, None, None, None, aux), right({}, True, sinks=sinks))


def test_16_bit_keys_of_float32_queries():
    out = flash_attention(Q, *(x.astype(jnp.bfloat16) for x in (K, V)))
    assert out.dtype == jnp.float32
    assert_close(out, right({}, True), 0.05)


def test_dropout_has_a_seed():
    one, again, other = (
        flash_attention(Q, K, V, dropout_prob=0.5, dropout_seed=seed) for seed in (None, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other)


def test_it_differentiates():
    options, seen = dict(causal=True, logits_soft_cap=1.5, mask_info=MaskInfo(ids=IDS)), SAME & (ROW >= KEY)
    aux = normal(6, HQ, 1)

    def loss(q, k, v, bias, aux):
        return jnp.sin(flash_attention(q, k, v, bias, None, None, aux, **options)).sum()

    def equations(q, k, v, bias, aux):
        return np.sin(right(options, seen, q, k, v, bias=bias, sinks=aux[:, 0])).sum()

    arrays = [Q, K, V, BIAS, aux]
    wanted, along = slope(equations, arrays)
    got = sum((g * u).sum() for g, u in zip(jax.grad(loss, range(5))(*arrays), along))
    assert_close(got, wanted, 1e-4)


PAGE, LENS, NEW = 4, (9, 14), (3, 1)  # keys, and new tokens, of two sequences
TABLES = i32([6, 1, 4, 0], [2, 7, 3, 5])
PAGED = {
    "plain": {},
    "window": dict(sliding_window=5),
    "window of two sides": dict(sliding_window=(5, 3)),
    "cap": dict(logits_soft_cap=1.5),
    "scale": dict(softmax_scale=0.3),
    "sinks": {"sinks": normal(8, HQ)},
}


def pages():
    """Queries `[4, hq, d]`, a pool of K0 V0 K1 V1 …, its new keys and values, and the sequences' keys and values."""
    k, v = ([x[i, :length] for i, length in enumerate(LENS)] for x in (K, V))
    pool = np.zeros((8, PAGE, 2 * HK, D), np.float32)
    for i, length in enumerate(LENS):
        for j in range(length):
            pool[TABLES[i, j // PAGE], j % PAGE] = np.stack((k[i][j], v[i][j]), 1).reshape(2 * HK, D)
    new = [np.concatenate([x[i][-n:] for i, n in enumerate(NEW)]) for x in (k, v)]
    return Q[0, : sum(NEW)], pool, new, (k, v)


@pytest.mark.parametrize("name", PAGED)
@pytest.mark.parametrize("version", ["v2", "v3", "unified"])
def test_pages_are_the_equations(version, name, implementation):
    options = dict(PAGED[name])
    sinks = options.pop("sinks", None)
    scale = options.get("softmax_scale", 1 if version == "v3" else D**-0.5)
    queries, pool, new, (k, v) = pages()
    starts = i32(0, 3, 4)
    if version == "unified":
        caches = pool[:, :, ::2], pool[:, :, 1::2]
        arrays = queries, *caches, i32(*LENS), TABLES, starts, None, None, sinks
        out = easydel.unified_attention(*arrays, **options, implementation=implementation)
    elif version == "v2":
        arrays = queries, pool, i32(*LENS), TABLES, starts, i32(2)
        out = easydel.ragged_page_attention_v2(*arrays, sinks, **options, implementation=implementation)
    else:
        before = pool.copy()
        for i, (length, count) in enumerate(zip(LENS, NEW)):
            for j in range(length - count, length):
                before[TABLES[i, j // PAGE], j % PAGE] = np.nan
        arrays = queries, *new, before, i32(*LENS), TABLES.ravel(), starts, i32(0, 0, 2)
        call = partial(easydel.ragged_page_attention_v3, **options, implementation=implementation)
        out, cache = call(*arrays, sinks)
        np.testing.assert_array_equal(cache, pool)
    for i, (length, count) in enumerate(zip(LENS, NEW)):
        row, key = length - count + np.arange(count)[:, None], np.arange(length)
        seen = (key <= row) & (row - key < np.ravel(options.get("sliding_window", S))[0])
        rows = queries[starts[i] : starts[i + 1]]
        scores = dict(scale=scale, softcap=options.get("logits_soft_cap"), sinks=sinks)
        wanted = masked_reference.attend(rows[None], k[i][None], v[i][None], seen, **scores)[0]
        assert_close(out[starts[i] : starts[i + 1]], wanted[0])


def test_pages_are_split_over_a_mesh():
    require_devices(2)
    queries, pool, new, _ = pages()
    arrays = queries, *new, pool, i32(*LENS), TABLES.ravel(), i32(0, 3, 4), i32(0, 0, 2), None
    mesh = jax.make_mesh((2,), ("tp",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    heads, cache = PartitionSpec(None, "tp"), PartitionSpec(None, None, "tp")
    specs = dict(in_specs=(heads,) * 3 + (cache,) + (PartitionSpec(),) * 5, out_specs=(heads, cache))
    out, written = easydel.ragged_page_attention_v3(*arrays, mesh=mesh, **specs)
    assert out.sharding.spec[1] == "tp"
    assert_close(out, easydel.ragged_page_attention_v3(*arrays)[0])
    np.testing.assert_array_equal(written, pool)


def test_alibi_over_pages():
    queries, pool, _, (k, v) = pages()
    slopes = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
    caches = pool[:, :, ::2], pool[:, :, 1::2]
    out = easydel.unified_attention(queries, *caches, i32(*LENS), TABLES, i32(0, 3, 4), slopes)
    bias = slopes[:, None, None] * (np.arange(LENS[1]) - (LENS[1] - 1.0))
    assert_close(out[3:], masked_reference.attend(queries[None, 3:], k[1][None], v[1][None], bias=bias)[0][0])


def test_sinks_over_pages_may_be_16_bit():
    """Models in bfloat16 have sinks in bfloat16."""
    sinks = normal(0, 4).astype(jnp.bfloat16)
    both = (unified(None, None, x) for x in (sinks, sinks.astype(np.float32)))
    assert_close(*map(np.asarray, both))


def unified(*rest, **named):
    return easydel.unified_attention(Q[0], K, V, i32(1, 1), i32([0], [1]), i32(0, 1, 2), *rest, **named)


ERRORS = {
    "traced dropout": (
        TypeError,
        lambda: jax.jit(lambda rate: flash_attention(Q, K, V, dropout_prob=rate))(0.5),
        r"dropout_prob must be a Python number .* traced value; close over it",
    ),
    "bias": (TypeError, lambda: flash_attention(Q, K, V, "x"), "bias must be an array, got 'x'"),
    "pages: bias": (NotImplementedError, lambda: unified(None, np.ones((2, 2), np.float32)), "qq_bias"),
    "pages: causal": (NotImplementedError, lambda: unified(causal=False), "causal must be True"),
    "pages: slopes": (
        NotImplementedError,
        lambda: unified(BIAS[0, :, 0, 0], logits_soft_cap=2.0),
        "alibi_slopes",
    ),
    "pages": (NotImplementedError, lambda: flash_attention(Q, K, V, *[None] * 4, i32([0])), "block_tables"),
    "pages: window": (
        ValueError,
        lambda: unified(sliding_window=1.5),
        "sliding_window must be an int of at least 1 or None, got 1.5",
    ),
    "window": (
        ValueError,
        lambda: flash_attention(Q, K, V, sliding_window=-3),
        "sliding_window is -3; allowed are None, an int ≥ 0 and a pair",
    ),
    "mask": (
        TypeError,
        lambda: flash_attention(Q, K, V, mask_info=np.ones((24, 24), bool)),
        "mask_info must be ejkernel's MaskInfo or None, got ndarray",
    ),
    "sums": (
        NotImplementedError,
        lambda: flash_attention(Q, K, V, normalize_output=False),
        "normalize_output",
    ),
    "sums of a number": (
        TypeError,
        lambda: flash_attention(Q, K, V, normalize_output=0),
        "normalize_output must be True or False, got 0",
    ),
    "pages: causal of None": (
        TypeError,
        lambda: unified(causal=None),
        "causal must be True or False, got None",
    ),
    "offsets": (NotImplementedError, lambda: flash_attention(Q, K, V, None, i32(0, 24)), "cum_seqlens need"),
    "sinks": (
        ValueError,
        lambda: flash_attention(Q, K, V, None, None, None, normal(0, 3, 2)),
        r"softmax_aux must have shape \[sinks\] or \[4, sinks\], got \(3, 2\)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name):
    error, call, message = ERRORS[name]
    function = "unified_attention" if "pages:" in name else "flash_attention"
    with pytest.raises(error, match=f"^easydel.{function}: {message}"):
        call()


def test_it_is_ejkernel_s_own():
    modules = pytest.importorskip("ejkernel.modules")
    info = pytest.importorskip("ejkernel.types").MaskInfo.from_segments(jnp.asarray(IDS))
    options = dict(causal=True, logits_soft_cap=1.5, softmax_scale=0.3, mask_info=info)
    given = [jnp.asarray(x) for x in (Q, K, V, BIAS)] + [None, None, jnp.asarray(normal(6, 3))]
    used = (IDS >= 0)[..., None, None]
    wanted = modules.flash_attention(*given, **options, platform="xla")
    assert_close(np.where(used, flash_attention(*given, **options), 0), np.where(used, wanted, 0), 1e-5)
    options = dict(causal=True, softmax_scale=0.3, mask_info=info)
    wanted = modules.scaled_dot_product_attention(*given[:4], **options, platform="xla")
    got = scaled_dot_product_attention(*given[:4], **options)
    assert_close(np.where(used, got, 0), np.where(used, wanted, 0), 1e-5)


def test_easydel_s_operation_runs_here(monkeypatch):
    own = pytest.importorskip("easydel.operations.kernels.flash_attention")
    infra, types_ = pytest.importorskip("easydel.infra"), pytest.importorskip("ejkernel.types")
    base = infra.EasyDeLBaseConfig()
    metadata = own.OperationMetadata(runtime_dtype=jnp.float32, base_config=base)
    calls = []

    def here(*given, **options):
        calls.append(options)
        return flash_attention(*given, **options)

    monkeypatch.setattr(own, "flash_attention", here)
    info = types_.MaskInfo.from_segments(jnp.asarray(IDS))
    given = dict(zip(("query", "key", "value"), map(jnp.asarray, (Q, K, V))))
    with base.mesh:
        out = own.FlashAttn(metadata)(**given, mask_info=info, causal=True).attention_outputs
    assert len(calls) == 1
    assert_close(out, right({}, SAME & (ROW >= KEY)))
