"""Attention of a Gemma-3-like layer with images: compat.gemma's masks compared with gemma's own equations.

python -m benchmarks.gemma_layer        the bar is 3 times gemma's own speed (issue 39)

8 query heads and 4 KV heads of 256; 2 × 4,096 tokens with four images of 256; local layers see 1,024 tokens to each
side.
"""

from __future__ import annotations

import math
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_flash import flash_attention, masks
from jax_flash.compat import gemma

from . import measure

BATCH, HEADS, KV_HEADS, HEAD_DIM, IMAGES = 2, 8, 4, 256, 4


def seen(size: int, window: int | None) -> Array:
    """The mask that gemma makes: causal, bidirectional within an image, and in local layers a window."""
    place = np.arange(size)
    part = size // IMAGES
    image = np.where((place % part >= 7) & (place % part < 7 + part // 4), place // part + 1, 0)
    visible = np.tril(np.ones((size, size), bool)) | ((image[:, None] == image) & (image > 0))
    if window:
        visible &= np.abs(place[:, None] - place) < window
    return jnp.asarray(np.broadcast_to(visible, (BATCH, size, size)))


def own(q: Array, k: Array, v: Array, visible: Array) -> Array:
    """gemma's `Attention` with GQA, from scores to the weighted values."""
    grouped = q.reshape(*q.shape[:2], KV_HEADS, -1, HEAD_DIM) / math.sqrt(HEAD_DIM)
    scores = jnp.einsum("BTKGH,BSKH->BTKGS", grouped, k)
    weights = jax.nn.softmax(jnp.where(visible[:, :, None, None], scores, -2.3819763e38), axis=-1)
    return jnp.einsum("BTKGS,BSKH->BTKGH", weights.astype(k.dtype), v).reshape(q.shape)


def ours(q: Array, k: Array, v: Array, visible: Array, *, ranges: bool) -> Array:
    mask = gemma._ranges(visible)[0] if ranges else masks.dense(visible[:, None])
    return flash_attention(q, k, v, mask=mask)


def both(attend: Any, dout: Array, q: Array, k: Array, v: Array, visible: Array) -> Any:
    """out and the gradients of query, key and value."""
    out, pull = jax.vjp(lambda *qkv: attend(*qkv, visible), q, k, v)
    return out, pull(dout)


def main(size: int) -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    q, k, v, dout = (
        jax.random.normal(key, (BATCH, size, n, HEAD_DIM), jnp.bfloat16)
        for key, n in zip(keys, heads, strict=True)
    )
    calls = {"own": own, "dense": partial(ours, ranges=False), "ranges": partial(ours, ranges=True)}
    for layer, window in (("global", None), ("local", size // 4)):
        arguments = [(q, k, v, seen(size, window))]
        for pass_ in ("forward", "forward and backward"):
            made = {
                name: (jax.jit(call if pass_ == "forward" else partial(both, call, dout)), arguments)
                for name, call in calls.items()
            }
            times = measure.in_turns(made)
            for name in calls:
                median, spread = times[name]["median"], times[name]["spread"]
                print(f"{layer:6} {pass_:20} {name:6} {1e3 * median:8.3f} ms ±{100 * spread:.1f}%, "
                      f"{times['own']['median'] / median:.2f} × own", flush=True)  # fmt: skip


if __name__ == "__main__":
    main(int((sys.argv[1:] or ["4096"])[0]))
