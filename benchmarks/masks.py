"""Masks that kernels read as ranges, blocks or boolean arrays, compared with calls of the plain kernels, on one GPU.

    python -m benchmarks.masks [LENGTH] [HEAD_DIM,HEAD_DIM,…] [PART OF A NAME]
    python -m benchmarks.masks decode                    decode with windows in arrays, compared with static ones
    python -m benchmarks.masks sparsity [LENGTH] [HEAD_DIM]     times at several shares of hidden pairs
    python -m benchmarks.masks plot FILE.png < OUTPUT           draws what `sparsity` printed

A rate is the FLOP per second over visible pairs, relative to a call without a mask value: to causal=True or, for masks
whose rows see few keys, to the same band (chunks as sequences of their own, a static window). An eighth of all blocks
is visible, chosen at random for each KV head, which one or four query heads share; they are also compared with causal
sequences of a quarter of the length, which have as many tokens and FLOP. "array" is a mask as booleans
[1, 1, s, s], for jax_flash and for jax.nn's cuDNN. Arrays, and documents by segment ids or as packed sequences, are
relative to the same mask as ranges. Times are medians of alternating bursts at settled power (measure.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash import (
    flash_attention,
    flash_attention_varlen,
    flops,
    masks,
    paged_attention,
)
from jax_flash.visible import conjunctions

from . import decode_calls, measure

BATCH, WIDTH, PART = 2, 2048, 8  # heads · head dim; a chunk, and a window, is 1 / PART of the length
Options = dict[str, Any]
Case = tuple[Options, tuple[str, ...]]  # of a call, and the calls that its rate is compared with
GROUP, CHOSEN = 4, 8  # query heads of a KV head; one in CHOSEN blocks is visible
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
    """Attention to the same documents by segment ids, or as packed sequences."""
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
    seen = conjunctions.array_of(mask.conditions, size, size)
    return jnp.broadcast_to(seen[:1, :1], (1, 1, size, size))


def cases(size: int, heads: int) -> dict[str, Case]:
    """The calls by name."""
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
    compared = {"chunks": "causal chunks", "first and window": "window"}
    grouped: Options = {"group": GROUP}
    quarter: Options = {"causal": True, "parts": CHOSEN // 2}
    plain: dict[str, Options] = {
        "causal": {"causal": True},
        "causal chunks": {"causal": True, "parts": PART},
        "window": {"causal": True, "window": (size // PART, None)},
        "causal quarters": quarter,
        "grouped causal": grouped | {"causal": True},
        "grouped causal quarters": grouped | quarter,
    }
    of_blocks: dict[str, Case] = {}
    for block in (128, 64):
        shared = grouped | {"mask": blocks(size, block, heads // GROUP)}
        of_blocks[f"blocks of {block}"] = shared, ("grouped causal", "grouped causal quarters")
        own: Options = {"mask": blocks(size, block, heads)}
        of_blocks[f"own blocks of {block}"] = own, ("causal", "causal quarters")
    arrays: dict[str, Case] = {
        f"{name}, {how}": ({"mask": values[name], "array": how}, (name,))
        for name in AS_ARRAYS
        for how in ("array", "cuDNN")
    } | {
        f"documents, {how}": ({"mask": values["documents"], "array": how}, ("documents",))
        for how in ("segments", "packed")
    }
    return (
        {name: (options, (name,)) for name, options in plain.items()}
        | {name: ({"mask": value}, (compared.get(name, "causal"),)) for name, value in values.items()}
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
    """cuDNN's calls, or why it refuses them."""
    try:
        return calls_of(options, arrays)
    except Exception as error:
        return str(error).splitlines()[0]


def run(size: int, d: int, wanted: str) -> None:
    arrays = tuple(
        jax.random.normal(key, (BATCH, size, WIDTH // d, d), jnp.bfloat16)
        for key in jax.random.split(jax.random.key(d), 4)
    )
    named = cases(size, WIDTH // d)
    chosen = {name for name in named if wanted in name}
    for _ in range(2):  # adds what these are compared with, then what the added calls are compared with
        chosen |= {other for name in chosen for other in named[name][1]}
    names = [name for name in named if name in chosen]
    # cuDNN's first calls run alone: captures of CUDA graphs fail if other threads launch kernels meanwhile.
    alone = [name for name in names if named[name][0].get("array") == "cuDNN"]
    others = [name for name in names if name not in alone]
    found = {name: calls_or_reason(named[name][0], arrays) for name in alone}
    with ThreadPoolExecutor(8) as pool:
        found |= zip(others, pool.map(lambda name: calls_of(named[name][0], arrays), others))
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
            relative = ", ".join(f"{rates[name] / rates[other]:.3f} of {other}" for other in beside)
            print(f"d{d} s{size} {pass_:8} {name:17} {median:9.4f} ms ±{spread:.1f}%, {relative}", flush=True)


# --- decode ----------------------------------------------------------------------------------------------------------

DECODE = {  # batch, query heads, KV heads, head dim, keys; the window
    "64 × 8,192 keys": ((64, 32, 8, 128, 8192), 1024),
    "8 × 65,536 keys": ((8, 32, 8, 128, 65536), 4096),
    "32 × 8,192 keys, d256": ((32, 16, 8, 256, 8192), 1024),
}
GLOBAL = 2**30  # a window that hides nothing


def steps(attend: Callable[..., Any]) -> Callable[..., Any]:
    """CHAIN decode steps in one program, each with a window of its own if `lefts` is given."""

    def run(query: Any, lefts: Any, *cache: Any) -> Any:
        for n in range(decode_calls.CHAIN):
            query = attend(query, None if lefts is None else lefts[n], *cache)
        return query

    return jax.jit(run)


def decode(name: str) -> None:
    """A decode step whose window is static, and the same as data: an array of its own, or a slice of one for all steps,
    as in a scan over layers, which XLA copies to an array of its own."""
    shape, left = DECODE[name]
    last = shape[-1] - 1
    q, k, v = decode_calls.draw(shape)

    def fixed(window: int | None) -> Callable[..., Any]:
        def attend(q: Any, size: Any, k: Any, v: Any) -> Any:
            if size is not None:
                return flash_attention(q, k, v, mask=masks.window(size, 0, offset=last))
            return flash_attention(q, k, v, causal=True, window=(window, None))

        return steps(attend)

    def paged(window: int | None) -> Callable[..., Any]:
        def attend(q: Any, size: Any, *cache: Any) -> Any:
            if size is not None:
                return paged_attention(q, *cache, mask=masks.window(size, 0, offset=cache[-1] - 1))
            return paged_attention(q, *cache, causal=True, window=(window, None))

        return steps(attend)

    for layout, make, cache in (
        ("contiguous", fixed, (k, v)),
        ("pages", paged, decode_calls.scattered(k, v, 64)),
    ):
        for kind, window in (("full", None), (f"window {left}", left)):
            sizes = jnp.full(decode_calls.CHAIN, GLOBAL if window is None else window, jnp.int32)
            lefts = {"static": None, "an array": tuple(sizes), "a slice": sizes}
            calls = {form: (make(window), [(q, left, *cache)]) for form, left in lefts.items()}
            results = [np.asarray(call(*given[0]), np.float32) for call, given in calls.values()]
            for got in results[1:]:
                difference = np.abs(got - results[0]).max()
                assert difference <= 0.02 * np.abs(results[0]).max(), (name, layout, kind)
            times = measure.in_turns(calls, repeats=6, seconds=0.02)
            us = {form: 1e6 * time["median"] / decode_calls.CHAIN for form, time in times.items()}
            ratios = ", ".join(
                f"{form} {us[form] / us['static']:.3f} ±{100 * times[form]['spread']:.1f}%"
                for form in ("an array", "a slice")
            )
            print(
                f"decode {name}, {layout}, {kind}: static {us['static']:.1f} µs, as data {ratios}", flush=True
            )


# --- time against sparsity -------------------------------------------------------------------------------------------


def by_sparsity(size: int) -> Iterator[tuple[str, Any]]:
    """Masks of several kinds that hide more and more pairs."""
    for length in (size, 3 * size // 4, size // 2, 0):
        yield "prefix-LM", masks.prefix_lm(jnp.full(BATCH, length, jnp.int32))
    row = jnp.arange(size, dtype=jnp.int32)[None, None]
    for count in (2, 4, 8, 16, 32):
        start = row // (size // count) * (size // count)
        yield "documents", masks.ranges(start, start + size // count)
    for part in (2, 4, 8, 16):
        draw = np.random.default_rng(part).random((1, 1, size // 128, size // 128))
        chosen = np.argsort(draw, -1)[..., : size // 128 // part]
        yield "blocks of 128", masks.blocks(jnp.asarray(chosen, jnp.int32), (128, 128))
    yield "nothing", masks.ranges(jnp.zeros_like(row), jnp.zeros_like(row))


WAYS = ("value", "array", "cuDNN, array")


def sparsity(size: int, d: int) -> None:
    """Prints the kind of mask, the way it is given, the share of hidden pairs, and milliseconds of each pass."""
    heads = WIDTH // d
    *qkv, dout = (
        jax.random.normal(key, (BATCH, size, heads, d), jnp.bfloat16)
        for key in jax.random.split(jax.random.key(d), 4)
    )
    attend = {
        "value": jax.jit(lambda qkv, mask: flash_attention(*qkv, mask=mask)),
        "cuDNN, array": jax.jit(
            lambda qkv, mask: jax.nn.dot_product_attention(*qkv, mask=mask, implementation="cudnn")
        ),
    }
    attend["array"] = attend["value"]
    pullbacks = {
        way: jax.jit(lambda qkv, mask, f=f: jax.vjp(lambda x: f(x, mask), qkv)[1])
        for way, f in attend.items()
    }
    backward = jax.jit(lambda pullback, x: pullback(x))
    forwards, backwards, hidden = {}, {}, {}
    for number, (kind, mask) in enumerate(by_sparsity(size)):
        array = array_of(mask, size)
        for way in WAYS if jax.default_backend() == "gpu" else WAYS[:2]:
            given = mask if way == "value" else array
            key = f"{number} {kind}|{way}"
            hidden[key] = 1 - flops(flash_attention, *qkv, mask=mask) / flops(flash_attention, *qkv)
            forwards[key] = attend[way], [(qkv, given)]
            backwards[key] = backward, [(pullbacks[way](qkv, given), dout)]
    times = [measure.in_turns(calls, repeats=4, seconds=0.02) for calls in (forwards, backwards)]
    print(f"# 2 × {size:,} tokens, {heads} heads of {d}: mask, way, hidden, forward ms, backward ms")
    for key, share in hidden.items():
        kind, way = key.split(" ", 1)[1].split("|")
        cells = (f"{1e3 * t[key]['median']:.4f}" for t in times)
        print("point", kind, way, f"{share:.4f}", *cells, sep="\t", flush=True)


def plot(lines: Iterable[str], path: str) -> None:
    """Draws the points that `sparsity` printed: a panel for each pass."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = [line.rstrip("\n").split("\t")[1:] for line in lines if line.startswith("point\t")]
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    styles = {"value": "-o", "array": "--s", "cuDNN, array": ":^"}
    colours = {"prefix-LM": "tab:blue", "documents": "tab:orange", "blocks of 128": "tab:green"}
    for column, (axes, title) in enumerate(zip(panels, ("forward", "backward"), strict=True)):
        for kind, colour in colours.items():
            for way, style in styles.items():
                own = sorted((float(x[2]), float(x[3 + column])) for x in points if x[:2] == [kind, way])
                if own:
                    axes.plot(*zip(*own, strict=True), style, color=colour, label=f"{kind}, {way}", ms=4)
        axes.set(title=title, xlabel="share of pairs that the mask hides", ylabel="ms", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)


def main(*arguments: str) -> None:
    command, rest = arguments[:1], arguments[1:]
    if command == ("decode",):
        for name in DECODE:
            decode(name)
    elif command == ("sparsity",):
        sparsity(*map(int, (*rest, *("8192", "128")[len(rest) :])))
    elif command == ("plot",):
        plot(sys.stdin, *rest)
    else:
        lengths, dims, part = (*arguments, *("8192", "64,128,256", "")[len(arguments) :])
        for dim in dims.split(","):
            run(int(lengths), int(dim), part)


if __name__ == "__main__":
    main(*sys.argv[1:])
