"""jax_flash.compat.pallas_tpu: JAX's flash_attention for Pallas on TPUs, against numpy and against JAX's reference."""

import importlib
import re

import jax
import jax.numpy as jnp
import masked_reference
import numpy as np
import pytest
from flash_attn_reference import assert_close, i32, normal, slope

from jax_flash.compat import pallas_tpu

B, H, SQ, SK, D = 2, 4, 12, 18, 16
Q, K, V = normal(0, B, H, SQ, D), normal(1, B, H, SK, D), normal(2, B, H, SK, D)
AB = normal(3, B, H, SQ, SK)
IDS = pallas_tpu.SegmentIds(
    i32([0] * 5 + [1] * 7, [3] * 2 + [0] * 10), i32([0] * 6 + [1] * 12, [0] * 9 + [3] * 9)
)
SAME = (IDS.q[:, :, None] == IDS.kv[:, None])[:, None]
CAUSAL = np.arange(SQ)[:, None] >= np.arange(SK)
CALLS = {
    "plain": ({}, True),
    "causal": (dict(causal=True), CAUSAL),
    "scale": (dict(sm_scale=0.3), True),
    "segments": (dict(segment_ids=IDS), SAME),
    "bias": (dict(ab=AB), True),
    "all": (dict(ab=AB, segment_ids=IDS, causal=True, sm_scale=0.25), SAME & CAUSAL),
}


def right(q, k, v, seen, ab=None, sm_scale=1.0, **_):
    q, k, v = (np.swapaxes(x, 1, 2) for x in (q, k, v))
    bias = None if ab is None else sm_scale * ab
    return masked_reference.attend(q, k, v, seen, scale=sm_scale, bias=bias)[0].swapaxes(1, 2)


@pytest.mark.parametrize("name", CALLS)
def test_it_is_the_equations(name, implementation):
    options, seen = CALLS[name]
    out = pallas_tpu.flash_attention(Q, K, V, **options, implementation=implementation)
    assert_close(out, right(Q, K, V, seen, **options))


def test_the_scale_does_not_round_a_bias_of_16_bits():
    q, k, v, ab = (jnp.asarray(x, jnp.bfloat16) for x in (0 * Q, K, V, 64 * AB))
    whole = [np.asarray(x, np.float32) for x in (q, k, v, ab)]
    out = pallas_tpu.flash_attention(q, k, v, ab, sm_scale=0.3)
    assert_close(out.astype(jnp.float32), right(*whole[:3], True, whole[3], 0.3), 2e-2)


def test_fewer_heads_of_keys_and_another_width_of_values():
    out = pallas_tpu.flash_attention(Q, K[:, :2], V[:, :2, :, :8], causal=True)
    assert_close(out, right(Q, K[:, [0, 0, 1, 1]], V[:, [0, 0, 1, 1], :, :8], CAUSAL))


def test_it_differentiates():
    def loss(q, k, v, ab):
        return jnp.sin(pallas_tpu.flash_attention(q, k, v, ab, IDS, causal=True, sm_scale=0.25)).sum()

    def equations(q, k, v, ab):
        return np.sin(right(q, k, v, SAME & CAUSAL, ab, 0.25)).sum()

    arrays = (Q, K, V, AB)
    wanted, along = slope(equations, arrays)
    got = sum((g * u).sum() for g, u in zip(jax.grad(loss, range(4))(*arrays), along))
    assert_close(got, wanted, 1e-4)


@pytest.mark.parametrize("name", CALLS)
def test_it_is_jax_s_own(name):
    try:
        own = importlib.import_module("jax.experimental.pallas.ops.tpu.flash_attention")
    except ImportError as e:
        pytest.skip(str(e))
    options, seen = CALLS[name]
    given = dict(options)
    if "segment_ids" in given:
        given["segment_ids"] = own.SegmentIds(*map(jnp.asarray, IDS))
    with jax.default_matmul_precision("highest"):
        wanted = own.mha_reference_no_custom_vjp(*map(jnp.asarray, (Q, K, V)), **given)
    rows = np.broadcast_to(seen, (B, 1, SQ, SK)).any(-1)[..., None]  # JAX averages the values of other rows
    sizes = own.BlockSizes.get_default(B, H, SQ, SK, D)
    assert_close(pallas_tpu.flash_attention(Q, K, V, **given, block_sizes=sizes) * rows, wanted * rows)


ERRORS = {
    "rank": (
        ValueError,
        lambda: pallas_tpu.flash_attention(Q[0], K, V),
        "q must have rank 4 [b h sq d], got shape (4, 12, 16)",
    ),
    "ab": (
        ValueError,
        lambda: pallas_tpu.flash_attention(Q, K, V, AB[..., :9]),
        "ab must broadcast to [b h sq sk] = (2, 4, 12, 18), got shape (2, 4, 12, 9)",
    ),
    "segment_ids": (
        TypeError,
        lambda: pallas_tpu.flash_attention(Q, K, V, None, tuple(IDS)),
        "segment_ids must be SegmentIds(q, kv), got tuple; SegmentIds(*pair) makes it of two",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    error, call, message = ERRORS[name]
    with pytest.raises(error, match="^" + re.escape("pallas_tpu.flash_attention: " + message)):
        call()


def test_block_sizes_of_this_module_have_jax_s_arguments():
    sizes = pallas_tpu.BlockSizes.get_default(B, H, SQ, SK, D)
    assert np.array_equal(
        pallas_tpu.flash_attention(Q, K, V, block_sizes=sizes), pallas_tpu.flash_attention(Q, K, V)
    )
