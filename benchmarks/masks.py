"""Masks that kernels read as ranges or blocks, beside calls of the plain kernels, on one GPU.

    python -m benchmarks.masks [LENGTH] [HEAD_DIM,HEAD_DIM,…] [PART OF A NAME]

A rate is FLOP of visible pairs in a second, over that of a call without a mask value: causal=True, or for masks whose
rows see few keys one of the same band (chunks as sequences of their own, a static window). Blocks are an eighth of all,
chosen at random for each KV head, which four query heads share, or one. Times are medians of bursts
in turns (measure.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash import flash_attention, flops, masks

from . import measure

BATCH, WIDTH, PART = 2, 2048, 8  # heads · head dim; the length over that of a chunk and a window
Options = dict[str, Any]
GROUP, CHOSEN = 4, 8  # query heads of a KV head; blocks over those that are chosen


def span_ids(size: int) -> Any:
    """256 tokens of an image in every 1,024."""
    at = np.arange(size)
    return jnp.asarray(np.where((at % 1024 >= 100) & (at % 1024 < 356), at // 1024, -1), jnp.int32)[None]


def blocks(size: int, block: int, heads: int) -> Any:
    """An eighth of all blocks of keys for each block of rows, at each head."""
    count = -(-size // block)
    draw = np.random.default_rng(block).random((1, heads, count, count))
    chosen = np.argsort(draw, -1)[..., : max(1, count // CHOSEN)]
    return masks.blocks(jnp.asarray(chosen, jnp.int32), (block, block))


def cases(size: int, heads: int) -> dict[str, tuple[Options, str]]:
    """Options of each call by its name, and the call that its rate is compared with."""
    row = jnp.arange(size, dtype=jnp.int32)[None, None]
    values = {
        "causal as ranges": masks.ranges(jnp.zeros_like(row), row + 1),
        "prefix": masks.prefix_lm(jnp.full(BATCH, size // 4, jnp.int32)),
        "spans": masks.causal() | masks.bidirectional_spans(span_ids(size)),
        "block diffusion": masks.block_diffusion(64),
        "chunks": masks.causal() & masks.chunked(size // PART),
        "first and window": masks.first_and_window(64, size // PART),
    }
    beside = {"chunks": "causal chunks", "first and window": "window"}
    grouped: Options = {"group": GROUP}
    of_blocks: dict[str, tuple[Options, str]] = {
        "grouped causal": (grouped | {"causal": True}, "grouped causal")
    }
    for block in (128, 64):
        shared = grouped | {"mask": blocks(size, block, heads // GROUP)}
        of_blocks[f"blocks of {block}"] = shared, "grouped causal"
        of_blocks[f"own blocks of {block}"] = {"mask": blocks(size, block, heads)}, "causal"
    return (
        {
            "causal": ({"causal": True}, "causal"),
            "causal chunks": ({"causal": True, "parts": PART}, "causal chunks"),
            "window": ({"causal": True, "window": (size // PART, None)}, "window"),
        }
        | {name: ({"mask": value}, beside.get(name, "causal")) for name, value in values.items()}
        | of_blocks
    )


def calls_of(options: Options, arrays: tuple[Any, ...]) -> tuple[Any, Any, int]:
    """The forward and the backward call, each with its arguments, and the FLOP of the forward."""
    parts, group = options.get("parts", 1), options.get("group", 1)
    options = {name: x for name, x in options.items() if name not in ("parts", "group")}
    q, k, v, dout = (x.reshape(x.shape[0] * parts, -1, *x.shape[2:]) for x in arrays)
    k, v = (x[:, :, ::group] for x in (k, v))

    def attend(*qkv: Any) -> Any:
        return flash_attention(*qkv, **options)

    forward: Callable[..., Any] = jax.jit(attend)
    backward: Callable[..., Any] = jax.jit(lambda pullback, x: pullback(x))
    pullback = jax.jit(lambda *qkv: jax.vjp(attend, *qkv)[1])(q, k, v)
    jax.block_until_ready((forward(q, k, v), backward(pullback, dout)))
    counted = flops(flash_attention, q, k, v, **options)
    return (forward, [(q, k, v)]), (backward, [(pullback, dout)]), counted


def run(size: int, d: int, wanted: str) -> None:
    arrays = tuple(
        jax.random.normal(key, (BATCH, size, WIDTH // d, d), jnp.bfloat16)
        for key in jax.random.split(jax.random.key(d), 4)
    )
    named = cases(size, WIDTH // d)
    chosen = {name for name in named if wanted in name}
    named = {name: named[name] for name in named if name in chosen | {named[each][1] for each in chosen}}
    with ThreadPoolExecutor(8) as pool:
        made = dict(zip(named, pool.map(lambda case: calls_of(case[0], arrays), named.values())))
    for index, pass_ in enumerate(("forward", "backward")):
        times = measure.in_turns({name: calls[index] for name, calls in made.items()}, repeats=7)
        rates = {name: made[name][2] / times[name]["median"] for name in made}
        for name, (_, beside) in named.items():
            median, spread = 1e3 * times[name]["median"], 100 * times[name]["spread"]
            print(f"d{d} s{size} {pass_:8} {name:17} {median:9.4f} ms ±{spread:.1f}%, "
                  f"{rates[name] / rates[beside]:.3f} of {beside}", flush=True)  # fmt: skip


if __name__ == "__main__":
    lengths, dims, part = (sys.argv[1:] + ["8192", "64,128,256", ""][len(sys.argv) - 1 :])[:3]
    for dim in dims.split(","):
        run(int(lengths), int(dim), part)
