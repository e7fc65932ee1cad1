"""Masks that kernels read as ranges, blocks or boolean arrays, beside calls of the plain kernels, on one GPU.

    python -m benchmarks.masks [LENGTH] [HEAD_DIM,HEAD_DIM,…] [PART OF A NAME]

A rate is FLOP of visible pairs in a second, over that of a call without a mask value: causal=True, or for masks whose
rows see few keys one of the same band (chunks as sequences of their own, a static window). Blocks are an eighth of all,
chosen at random for each KV head, which four query heads share, or one. An array is a mask's [1, 1, s, s] of booleans,
for jax_flash and for jax.nn's cuDNN; its rate is compared with that of the same mask as ranges, as are documents by
segment ids and as packed sequences. Times are medians of bursts in turns at settled power (measure.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash import flash_attention, flash_attention_varlen, flops, mask_forms, masks
from jax_flash.mask_rows import Rows

from . import measure

BATCH, WIDTH, PART = 2, 2048, 8  # heads · head dim; a chunk, and a window, is 1 / PART of the length
Options = dict[str, Any]
GROUP, CHOSEN = 4, 8  # query heads of a KV head; blocks over those that are chosen
AS_ARRAYS = ("prefix", "documents", "spans", "block diffusion")


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


def starts_of_documents(size: int) -> np.ndarray[Any, Any]:
    """The first token of each document; their lengths differ by a factor of up to 60."""
    ends = np.cumsum(np.random.default_rng(0).lognormal(6, 1, size).astype(int) + 50)
    return np.concatenate(([0], ends[ends < size]))


def documents(size: int) -> Any:
    """Causal documents."""
    starts = starts_of_documents(size)
    own = starts[np.searchsorted(starts, np.arange(size), "right") - 1]
    return masks.ranges(
        jnp.asarray(own, jnp.int32)[None, None], jnp.arange(1, size + 1, dtype=jnp.int32)[None, None]
    )


def attend_to_documents(how: str, q: Any, k: Any, v: Any) -> Any:
    """The same by segment ids, or as packed sequences."""
    batch, size = q.shape[:2]
    starts = starts_of_documents(size)
    if how == "segments":
        ids = jnp.asarray(np.searchsorted(starts, np.arange(size), "right"), jnp.int32)[None].repeat(batch, 0)
        return flash_attention(q, k, v, causal=True, segment_ids=ids)
    first = np.concatenate([starts + i * size for i in range(batch)] + [[batch * size]])
    packed = (x.reshape(batch * size, *x.shape[2:]) for x in (q, k, v))
    return flash_attention_varlen(*packed, jnp.asarray(first, jnp.int32), causal=True).reshape(q.shape)


def array_of(mask: Any, size: int) -> Any:
    """The mask of the first batch entry and head."""
    columns = jnp.arange(size, dtype=jnp.int32)[None]
    seen = mask_forms.seen(mask_forms.resolve(mask.conditions, Rows.fixed(size, size)), size, columns)
    return jnp.broadcast_to(seen[:1, :1], (1, 1, size, size))


def cases(size: int, heads: int) -> dict[str, tuple[Options, str]]:
    """Options of each call by its name, and the call that its rate is compared with."""
    row = jnp.arange(size, dtype=jnp.int32)[None, None]
    values = {
        "causal as ranges": masks.ranges(jnp.zeros_like(row), row + 1),
        "prefix": masks.prefix_lm(jnp.full(BATCH, size // 4, jnp.int32)),
        "documents": documents(size),
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
    arrays: dict[str, tuple[Options, str]] = {
        f"{name}, {how}": ({"mask": values[name], "array": how}, name)
        for name in AS_ARRAYS
        for how in ("array", "cuDNN")
    } | {
        f"documents, {how}": ({"mask": values["documents"], "array": how}, "documents")
        for how in ("segments", "packed")
    }
    return (
        {
            "causal": ({"causal": True}, "causal"),
            "causal chunks": ({"causal": True, "parts": PART}, "causal chunks"),
            "window": ({"causal": True, "window": (size // PART, None)}, "window"),
        }
        | {name: ({"mask": value}, beside.get(name, "causal")) for name, value in values.items()}
        | of_blocks
        | arrays
    )


def calls_of(options: Options, arrays: tuple[Any, ...]) -> tuple[Any, Any, int]:
    """The forward and the backward call, each with its arguments, and the FLOP of the forward."""
    parts, group, how = options.get("parts", 1), options.get("group", 1), options.get("array")
    options = {name: x for name, x in options.items() if name not in ("parts", "group", "array")}
    q, k, v, dout = (x.reshape(x.shape[0] * parts, -1, *x.shape[2:]) for x in arrays)
    k, v = (x[:, :, ::group] for x in (k, v))
    array = (
        (array_of(options["mask"], q.shape[1]),) if how in ("array", "cuDNN") else ()
    )  # an argument, not a constant of the program

    def attend(qkv: Any, *mask: Any) -> Any:
        if how == "cuDNN":
            return jax.nn.dot_product_attention(*qkv, mask=mask[0], implementation="cudnn")
        if how in ("segments", "packed"):
            return attend_to_documents(how, *qkv)
        return flash_attention(*qkv, **options | ({"mask": mask[0]} if mask else {}))

    forward: Callable[..., Any] = jax.jit(attend)
    backward: Callable[..., Any] = jax.jit(lambda pullback, x: pullback(x))
    pullback = jax.jit(lambda qkv, *mask: jax.vjp(lambda x: attend(x, *mask), qkv)[1])((q, k, v), *array)
    jax.block_until_ready((forward((q, k, v), *array), backward(pullback, dout)))
    counted = flops(flash_attention, q, k, v, **options)
    return (forward, [((q, k, v), *array)]), (backward, [(pullback, dout)]), counted


def calls_or_reason(options: Options, arrays: tuple[Any, ...]) -> tuple[Any, Any, int] | str:
    """The calls, or why cuDNN refuses them."""
    try:
        return calls_of(options, arrays)
    except Exception as error:
        if options.get("array") != "cuDNN":
            raise
        return str(error).splitlines()[0]


def run(size: int, d: int, wanted: str) -> None:
    arrays = tuple(
        jax.random.normal(key, (BATCH, size, WIDTH // d, d), jnp.bfloat16)
        for key in jax.random.split(jax.random.key(d), 4)
    )
    named = cases(size, WIDTH // d)
    chosen = {name for name in named if wanted in name}
    for _ in range(2):  # what these are compared with, and what that is
        chosen |= {named[name][1] for name in chosen}
    names = [name for name in named if name in chosen]
    with ThreadPoolExecutor(8) as pool:
        found = dict(zip(names, pool.map(lambda name: calls_or_reason(named[name][0], arrays), names)))
    for name, reason in found.items():
        if isinstance(reason, str):
            print(f"d{d} s{size} {name}: {reason}", flush=True)
    made = {name: calls for name, calls in found.items() if not isinstance(calls, str)}
    named = {name: named[name] for name in made}
    for index, pass_ in enumerate(("forward", "backward")):
        times = measure.in_turns(
            {name: calls[index] for name, calls in made.items()}, repeats=5, settle=measure.SETTLED
        )
        rates = {name: made[name][2] / times[name]["median"] for name in made}
        for name, (_, beside) in named.items():
            median, spread = 1e3 * times[name]["median"], 100 * times[name]["spread"]
            print(f"d{d} s{size} {pass_:8} {name:17} {median:9.4f} ms ±{spread:.1f}%, "
                  f"{rates[name] / rates[beside]:.3f} of {beside}", flush=True)  # fmt: skip


if __name__ == "__main__":
    lengths, dims, part = (sys.argv[1:] + ["8192", "64,128,256", ""][len(sys.argv) - 1 :])[:3]
    for dim in dims.split(","):
        run(int(lengths), int(dim), part)
