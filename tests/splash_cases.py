"""Masks of jax_flash.compat.splash, each beside the form that the kernels get, and comparisons with JAX's reference."""

import importlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flash_attn_reference import assert_close, i32, normal

from jax_flash.compat import splash
from jax_flash.compat.costs import CostWarning

HQ, HK, SQ, SK, D, DV = 4, 2, 12, 18, 16, 8
SHAPE = SQ, SK
Q, K, V = normal(0, 2, HQ, SQ, D) / 4, normal(1, 2, HK, SK, D), normal(2, 2, HK, SK, DV)
IDS = splash.SegmentIds(
    i32([0] * 5 + [1] * 7, [3] * 2 + [0] * 10), i32([0] * 6 + [1] * 12, [0] * 9 + [3] * 9)
)
RANDOM = np.random.default_rng(3).random(SHAPE) < 0.5
ROW, KEY = np.arange(SQ)[:, None], np.arange(SK)
PREFIX = (KEY <= ROW) | (KEY < 5)
LEFT = (2, 0)

# Each entry: a function of the module that has the mask classes, and the kind of mask that the kernels here get.
MASKS = {
    "full": (lambda m: m.FullMask(SHAPE), "band"),
    "causal": (lambda m: m.CausalMask(SHAPE), "band"),
    "causal, offset 3": (lambda m: m.CausalMask(SHAPE, 3), "band"),
    "causal, offset −2": (lambda m: m.CausalMask(SHAPE, offset=-2), "band"),
    "local": (lambda m: m.LocalMask(SHAPE, (3, 0), 0), "band"),
    "local, offset": (lambda m: m.LocalMask(SHAPE, (2, 1), offset=4), "band"),
    "local, right alone": (lambda m: m.LocalMask(SHAPE, (None, 2), 0), "band"),
    "local, left alone": (lambda m: m.LocalMask(SHAPE, (4, None), -1), "band"),
    "chunked": (lambda m: m.ChunkedCausalMask(SHAPE, 5), "band"),
    "causal and local": (lambda m: m.CausalMask(SHAPE, 1) & m.LocalMask(SHAPE, (2, 4), 0), "band"),
    "chunked and local": (lambda m: m.ChunkedCausalMask(SHAPE, 5) & m.LocalMask(SHAPE, LEFT, 0), "band"),
    "chunks of two sizes": (lambda m: m.ChunkedCausalMask(SHAPE, 5) & m.ChunkedCausalMask(SHAPE, 4), "ranges"),
    "one in the other": (lambda m: m.CausalMask(SHAPE) | m.LocalMask(SHAPE, LEFT, 0), "band"),
    "two windows": (lambda m: m.LocalMask(SHAPE, LEFT, 0) | m.LocalMask(SHAPE, LEFT, 6), "ranges"),
    "three windows": (
        lambda m: m.LocalMask(SHAPE, LEFT, 0) | m.LocalMask(SHAPE, LEFT, 5) | m.LocalMask(SHAPE, (0, 0), 8),
        "dense",
    ),
    "an array that is causal": (lambda m: m.NumpyMask(KEY <= ROW + 2), "band"),
    "an array, prefix LM": (lambda m: m.NumpyMask(PREFIX), "ranges"),
    "an array": (lambda m: m.NumpyMask(RANDOM), "dense"),
    "an array and causal": (lambda m: m.NumpyMask(RANDOM) & m.CausalMask(SHAPE, 6), "dense"),
    "an array or local": (lambda m: m.NumpyMask(PREFIX) | m.LocalMask(SHAPE, (0, 2), 7), "ranges"),
    "by head": (
        lambda m: [m.FullMask(SHAPE), m.LocalMask(SHAPE, LEFT, 3), m.CausalMask(SHAPE), m.NumpyMask(PREFIX)],
        "ranges",
    ),
    "by head, an array": (lambda m: [m.NumpyMask(RANDOM), *(m.CausalMask(SHAPE, h) for h in (1, 2, 3))], "dense"),
}  # fmt: skip


def jax_own(module="kernel"):
    """JAX's module, if this version of JAX has it."""
    try:
        return importlib.import_module(
            f"jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_{module}"
        )
    except ImportError as e:
        pytest.skip(str(e))


def multi_head(module, name, heads=HQ):
    found = MASKS[name][0](module)
    return module.MultiHeadMask(found if isinstance(found, list) else [found] * heads)


def make(mask, make=splash.make_splash_mha_single_device, **options):
    """The kernel. Its warning about a dense mask is silenced."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CostWarning)
        return make(mask, **options)


def results(call, weights, arrays, ids=None):
    """Out, logsumexp and the gradients of a loss that weighs both, over the batch."""

    def loss(arrays):
        out, (lse,) = jax.vmap(call)(*arrays[:3], ids, *arrays[3:])
        seen = jnp.isfinite(lse) & (lse > -1e30)
        return (out * weights).sum() + jnp.sin(jnp.where(seen, lse, 0)).sum(), (out, jnp.where(seen, lse, 0))

    (_, found), gradients = jax.value_and_grad(loss, has_aux=True)(arrays)
    return *found, *gradients


def compare(got, right):
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), got, right, strict=False):
        assert_close(x, np.asarray(y), 1e-4 if name[0] == "d" else 2e-5)


def sees(mask, ids):
    """Rows that see a key, [b, hq, sq, 1]. Splash's results for other rows are undefined."""
    seen = mask[:, :, :][None]
    if ids is not None:
        seen = seen & (np.asarray(ids.q)[:, None, :, None] == np.asarray(ids.kv)[:, None, None, :])
    return np.broadcast_to(seen.any(-1, keepdims=True), (2, HQ, SQ, 1))
