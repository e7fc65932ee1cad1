"""compat.levanter.grug_attention, over raw arrays, against numpy, and against Levanter itself where it is installed."""

import re
import sys
import types
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import masked_reference
import numpy as np
import pytest
from flash_attn_reference import assert_close, i32, normal, slope

from jax_flash.compat.levanter import grug_attention, patch

B, S, HQ, HK, D = 2, 12, 4, 2, 16
Q, K, V = normal(0, B, S, HQ, D), normal(1, B, S, HK, D), normal(2, B, S, HK, D)
ROW, KEY = np.arange(S)[:, None], np.arange(S)
IDS = i32([0] * 5 + [1] * 7, [2] * 3 + [0] * 9)
SAME = (IDS[:, :, None] == IDS[:, None])[:, None]
SEEN = np.random.default_rng(4).random((B, S, S)) < 0.6
LOWER = i32([0] * 4 + [4] * 8, [0] * 7 + [5] * 5)
VALID = i32(12, 9)[:, None] > KEY


@dataclass
class AttentionMask:
    """Grug's mask, so that these tests run without Levanter."""

    is_causal: bool = False
    segment_ids: tuple[Any, Any] | None = None
    sliding_window: int | None = None
    fa4_bounds: tuple[Any, Any] | None = None
    prefix: int | None = field(default=None)  # of another version


MASKS = {
    "none": (None, True),
    "causal": (AttentionMask(True), ROW >= KEY),
    "window": (AttentionMask(True, None, 4), (ROW >= KEY) & (ROW - KEY < 4)),
    "window alone": (AttentionMask(False, None, 4), ROW - KEY < 4),
    "segments": (AttentionMask(True, (IDS, IDS)), SAME & (ROW >= KEY)),
    "segments of all entries": (AttentionMask(True, (IDS[0], IDS[0]), 3), SAME[:1] & (ROW >= KEY) & (ROW - KEY < 3)),
    "segments of one entry": (AttentionMask(False, (IDS[1:], IDS[1:])), SAME[1:]),
    "FA4 bounds": (
        AttentionMask(True, fa4_bounds=(LOWER, VALID)),
        ((LOWER[:, :, None] <= KEY) & (KEY <= ROW) & VALID[:, :, None])[:, None],
    ),
    "an array": (SEEN, SEEN[:, None]),
    "an array of all entries": (SEEN[0], SEEN[:1, None]),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_masks(name, implementation):
    mask, seen = MASKS[name]
    mask = jnp.asarray(mask) if isinstance(mask, np.ndarray) else mask
    out = grug_attention(Q, K, V, mask, implementation=implementation)
    assert_close(out, masked_reference.attend(Q, K, V, seen)[0])


def test_an_additive_mask_is_a_differentiable_bias():
    bias = normal(3, 1, S, S)

    def loss(q, k, v, bias):
        return jnp.sin(grug_attention(q, k, v, bias)).sum()

    def equations(q, k, v, bias):
        return np.sin(masked_reference.attend(q, k, v, bias=bias[:, None])[0]).sum()

    arrays = (Q, K, V, bias)
    wanted, along = slope(equations, arrays)
    got = sum((g * u).sum() for g, u in zip(jax.grad(loss, range(4))(*arrays), along))
    assert_close(got, wanted, 1e-4)


def test_names_of_grug_s_kernels_have_no_effect():
    wanted = grug_attention(Q, K, V, AttentionMask(True))
    for name in ("gpu_fa4_cute", "reference"):
        assert np.array_equal(grug_attention(Q, K, V, AttentionMask(True), implementation=name), wanted)


ERRORS = {
    "rank": (ValueError, lambda: grug_attention(Q[0], K, V, None), "q must have rank 4 [B tokens heads D]"),
    "a mask of heads": (
        ValueError,
        lambda: grug_attention(Q, K, V, SEEN[:, None]),
        "mask must be [Q, K] or [B, Q, K], got shape (2, 1, 12, 12)",
    ),
    "segments of other entries": (
        ValueError,
        lambda: grug_attention(Q, K, V, AttentionMask(True, (np.zeros((3, S), np.int32),) * 2)),
        "segment_ids' q_ids must broadcast to [B tokens] = (2, 12), got shape (3, 12)",
    ),
    "a field of another version": (
        NotImplementedError,
        lambda: grug_attention(Q, K, V, AttentionMask(True, prefix=4)),
        "mask has prefix, which this version of jax_flash does not know, only fa4_bounds, is_causal, segment_ids, "
        "sliding_window; mask.materialize_mask(12, 12) is an array with all of them",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    error, call, message = ERRORS[name]
    with pytest.raises(error, match="^" + re.escape("levanter.grug_attention: " + message)):
        call()


def test_patch_reaches_models_that_have_taken_the_name(monkeypatch):
    def own():
        raise NotImplementedError

    names = ("levanter.layers.attention", "levanter.grug.attention", "levanter.models.snowball", "other")
    for name in ("levanter", "levanter.layers", "levanter.grug", "levanter.models", *names):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[names[0]].dot_product_attention = own
    users = [sys.modules[name] for name in names[1:]]
    for module in users:
        module.attention = own
    patch()
    assert [x.attention for x in users] == [grug_attention, grug_attention, own]


@pytest.mark.parametrize("window", [None, 5])
def test_it_is_levanter_s_own(window):
    """The result equals that of Grug's reference, and the bounds of its FA4 kernel those of its segments."""
    own = pytest.importorskip("levanter.grug.attention")
    mask = own.AttentionMask.causal(sliding_window=window).with_segment_ids(IDS)
    with jax.default_matmul_precision("highest"):
        wanted = own.reference_attention(*map(jnp.asarray, (Q, K, V)), mask, logits_dtype=jnp.float32)
    assert_close(grug_attention(Q, K, V, mask), np.asarray(wanted))
    bounds = own.fa4_cute_segment_bounds(mask, batch_size=B, seq_len=S, sliding_window=window)
    assert_close(
        grug_attention(Q, K, V, own.AttentionMask.causal().with_fa4_bounds(*bounds)), np.asarray(wanted)
    )
