"""Decode cells of the peers' suite: GB/s of keys and values of this library, cuDNN, Pallas and a streaming read.

The calls of a cell are chained in one program, so that its times are the device's. The caches of one short sequence
then stay in the L2 cache, for every implementation alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import jax_flash

from . import cases, decode_calls, flop, measure, paged_steps, peers
from .bars import Cell
from .cases import Case
from .decode_calls import Call, contiguous, paged, ragged, scattered
from .peer_attention import timed

CHAIN_OF_SHORT = 32  # calls of a few microseconds in one program
ONE = (*((b, 32, 8, 128, keys) for b in (1, 8) for keys in (512, 1024, 4096)), (1, 32, 4, 128, 1024))
MANY = (1024, 32, 8, 128, 512)
KINDS = (64, 32, 8, 128, 8192)
RAGGED = (64, 32, 8, 128, 65536)
LONG = 65536  # keys from which a sequence is split over the whole card, where batch_invariant costs most
WINDOW, NARROW = 1024, 128
READ_ROW = 4096  # words
SLOTS = 16  # tokens in the pages of a small pool

Shape = tuple[int, ...]
Made = dict[str, Callable[[], Call]]


def prepared(made: Made, chain: int) -> tuple[measure.Calls, dict[str, Any]]:
    """The calls, chained and compiled in parallel, and the reasons of those that do not run."""

    def compile_one(make: Callable[[], Call]) -> peers.Finish:
        call, arguments = decode_calls.chained(make(), chain)
        call.lower(*arguments[0]).compile()
        return lambda: (call, arguments)

    return peers.compiled_side_by_side({n: functools.partial(compile_one, make) for n, make in made.items()})


def cell(
    name: str, made: Made, sizes: dict[str, float], chain: int = decode_calls.CHAIN, **tags: Any
) -> Cell:
    """One cell. `sizes`: the bytes that each call has to read, by its name; those of all other calls are under ""."""
    if "shape" in tags:
        decode_calls.draw(tags["shape"])  # cached, because calls are made in parallel
    calls, refused = prepared(made, chain)
    times = measure.of_one(timed(calls), chain) | refused
    bytes_read = {each: sizes.get(each, sizes.get("", 0.0)) for each in made}
    return {"kind": "bandwidth", "name": name, "bytes_read": bytes_read, "times": times} | tags


# --- peers ------------------------------------------------------------------------------------------------------------


def cudnn(shape: Shape) -> Call:
    def call(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")

    return call, decode_calls.draw(shape)


def pallas_paged(shape: Shape, size: int) -> Call:
    """JAX's own example kernel for Triton, whose pools have the heads first: blocks of 128 keys."""
    from jax.experimental.pallas.ops.gpu import paged_attention as module

    q, k, v = decode_calls.draw(shape)
    k_pages, v_pages, tables, lengths = scattered(k, v, size)
    pools = (jnp.moveaxis(x, 2, 0) for x in (k_pages, v_pages))
    options = {"pages_per_compute_block": max(1, 128 // size)}

    def call(q: Any, *arrays: Any) -> Any:  # it has no scale: softmax(q kᵀ) v
        return module.paged_attention(q[:, 0], *arrays, **options)[:, None]

    return call, (q, *pools, tables, lengths)


def flash_attn3(shape: Shape, size: int | None) -> Call:
    """flash-attn3-jax over a cache, contiguous or in pages of `size` tokens, with splits that fill the card."""
    from flash_attn3_jax import flash_mha_with_kvcache

    b, _, hk, _, _ = shape
    splits = max(1, min(16, 132 // (b * hk)))
    q, k, v = decode_calls.draw(shape)
    if size is None:
        return lambda q, k, v: flash_mha_with_kvcache(q, k, v, num_splits=splits), (q, k, v)

    def call(q: Any, k: Any, v: Any, tables: Any, lengths: Any) -> Any:
        options = {"page_table": tables, "cache_seqlens": lengths, "num_splits": splits}
        return flash_mha_with_kvcache(q, k, v, **options)

    return call, (q, *scattered(k, v, size))


def streaming_read(shape: Shape) -> Call:
    return _read, decode_calls.draw(shape)


def _read(q: Any, *arrays: Any) -> Any:
    """Reads all arrays for the largest word of each; the read depends on the result of the call before."""
    before = q.ravel()[0].astype(jnp.int32)
    for x in arrays:
        words = lax.bitcast_convert_type(x.reshape(-1, READ_ROW, 2), jnp.int32)
        q = q + (words + before).max(1).max().astype(q.dtype) * 0
    return q


# --- cells ------------------------------------------------------------------------------------------------------------


def kv_bytes(shape: Shape, keys: float | None = None, itemsize: int = 2) -> float:
    b, _, hk, d, longest = shape
    return flop.kv_bytes(b, hk, d, longest if keys is None else keys, itemsize)


def layouts(shape: Shape, page_of_one: bool = False) -> Made:
    sizes = (64, 16, 1) if page_of_one else (64, 16)
    made: Made = {"contiguous": functools.partial(contiguous, jax_flash, shape)}
    return made | {f"pages of {size}": functools.partial(paged, jax_flash, shape, size) for size in sizes}


def long_cells() -> Iterator[Cell]:
    """One query token and long caches: every layout, cuDNN, the paged kernel of Pallas, and a read of the same
    bytes."""
    for shape in (*cases.DECODE[:-1], MANY):
        made = layouts(shape, page_of_one=shape[4] == 8192)
        made["cudnn"] = functools.partial(cudnn, shape)
        made |= {
            f"pallas, pages of {size}": functools.partial(pallas_paged, shape, size) for size in (16, 64)
        }
        made["read"] = functools.partial(streaming_read, shape)
        if shape[4] >= LONG:
            made["batch invariant"] = functools.partial(paged, jax_flash, shape, 64, batch_invariant=True)
        yield cell(cases.decode_name(shape), made, {"": kv_bytes(shape)}, of="long", shape=shape)


def one_cells() -> Iterator[Cell]:
    """One and eight sequences of few keys, whose calls take microseconds."""
    for shape in ONE:
        made = layouts(shape)
        made["cudnn"] = functools.partial(cudnn, shape)
        made["pallas, pages of 16"] = functools.partial(pallas_paged, shape, 16)
        yield cell(
            cases.decode_name(shape), made, {"": kv_bytes(shape)}, CHAIN_OF_SHORT, of="one", shape=shape
        )


def with_sinks(shape: Shape, window: int) -> Call:
    call, arguments = paged(jax_flash, shape, 64, window=(window - 1, 0), sinks=jnp.ones(shape[1]))
    return call, arguments


def kind_cells() -> Iterator[Cell]:
    """The plain call and every other kind of call, over pages of 64."""
    shape, narrow = KINDS, (64, 64, 8, 64, 8192)
    short, long = (ragged(jax_flash, x) for x in (KINDS, RAGGED))
    made: Made = {
        "plain": functools.partial(paged, jax_flash, shape, 64),
        "ragged to 8,192": lambda: short[0],
        "ragged to 65,536": lambda: long[0],
        "window 1,024": functools.partial(paged, jax_flash, shape, 64, window=(WINDOW - 1, 0)),
        "window 128, sinks, d64": functools.partial(with_sinks, narrow, NARROW),
        "float8": functools.partial(decode_calls.float8, jax_flash, shape),
        "float32": functools.partial(paged, jax_flash, shape, 64, "float32"),
        "float16": functools.partial(paged, jax_flash, shape, 64, "float16"),
        "batch invariant": functools.partial(paged, jax_flash, shape, 64, batch_invariant=True),
        "packed": functools.partial(decode_calls.packed, jax_flash, shape),
    }
    sizes = {
        "": kv_bytes(shape),
        "ragged to 8,192": kv_bytes(shape, short[1]),
        "ragged to 65,536": kv_bytes(shape, long[1]),
        "window 1,024": kv_bytes(shape, WINDOW),
        "window 128, sinks, d64": kv_bytes(narrow, NARROW),
        "float8": kv_bytes(shape, itemsize=1),
        "float32": kv_bytes(shape, itemsize=4),
    }
    yield cell(f"{cases.decode_name(shape)}, kinds", made, sizes, of="kinds", shape=shape)


def append(tokens: int, fused: bool) -> Call:
    """Writes new keys in place, rotated or not; the pool is so small that copying it once for the chain costs
    nothing."""
    h, d, pages = 8, 128, 1
    keys = (jax.random.key(seed, impl="rbg") for seed in range(2))
    k, v = (jax.random.normal(key, (tokens, 1, h, d), jnp.bfloat16) for key in keys)
    pools = tuple(jnp.zeros((tokens * pages, SLOTS, h, d), jnp.bfloat16) for _ in range(2))
    tables = jnp.arange(tokens * pages, dtype=jnp.int32).reshape(tokens, pages)
    lengths = jnp.full(tokens, 7, jnp.int32)
    angles = jnp.arange(64)[:, None] * 10_000.0 ** (-jnp.arange(d // 2) / (d // 2))
    rotary = {"rotary": (jnp.cos(angles), jnp.sin(angles))} if fused else {}

    def call(pools: Any, k: Any, v: Any) -> Any:
        return jax_flash.append_kv(*pools, k, v, tables, lengths, **rotary)[:2]

    return call, (pools, k, v)


def append_cells() -> Iterator[Cell]:
    made = {
        f"{n} tokens{how}": functools.partial(append, n, bool(how))
        for n in (64, 1024)
        for how in ("", ", rotary")
    }
    sizes = {name: float(int(name.split()[0]) * 8 * 128 * 2 * 2 * 2) for name in made}  # read and written
    yield cell("append_kv, 8 heads, d128", made, sizes, 32, of="append")


def latent_read() -> Call:
    q, pool, *_ = decode_calls.latent(jax_flash, 1)[1]
    return _read, (q, pool)


def latent_cells() -> Iterator[Cell]:
    b, keys, _ = decode_calls.LATENT
    counts = (16, 64, 128)
    made: Made = {f"{n} heads": functools.partial(decode_calls.latent, jax_flash, n) for n in counts}
    made["read"] = latent_read
    columns = decode_calls.LATENT_DIM
    sizes = {"": float(b * keys * columns * 2)}
    work = {f"{n} heads": 2.0 * b * n * keys * (columns + decode_calls.LATENT_VALUES) for n in counts}
    yield cell(f"decode b{b}, latent head of {columns}, kv{keys}", made, sizes, of="latent", work=work)


def flash_attn3_cells() -> Iterator[Cell]:
    for shape in (cases.DECODE[3], cases.DECODE[5], ONE[0]):
        made = {"contiguous": functools.partial(contiguous, jax_flash, shape)}
        made["pages of 64"] = functools.partial(paged, jax_flash, shape, 64)
        made["flash-attn3-jax"] = functools.partial(flash_attn3, shape, None)
        made["flash-attn3-jax, pages of 64"] = functools.partial(flash_attn3, shape, 64)
        yield cell(
            f"{cases.decode_name(shape)}, flash-attn3-jax",
            made,
            {"": kv_bytes(shape)},
            of="others",
            shape=shape,
        )


def prefill_cells() -> Iterator[Cell]:
    """Prompts of 4,096 tokens over pages: grouped heads, and each head dim of the matrix, full and causal."""
    shapes = [(2, 16, 16, 128, True), (2, 32, 8, 128, True)]
    shapes += [(4, cases.WIDTH // d, cases.WIDTH // d, d, c) for d in cases.HEAD_DIMS for c in (False, True)]
    for b, hq, hk, d, causal in shapes:
        name = f"prefill b{b} s4096 {hq}/{hk} d{d}{' causal' if causal else ''}"
        sizes = {"b": b, "sq": 4096, "sk": 4096, "hq": hq, "hk": hk, "d": d, "dv": d, "causal": causal}
        case = Case(name, dtype="bfloat16", **sizes)
        layouts = {"contiguous": None, "pages of 16": 16, "pages of 64": 64}
        calls = {what: decode_calls.prefill(jax_flash, case, size) for what, size in layouts.items()}
        yield {"kind": "prefill", "name": name, "d": d, "times": timed(calls)}


SECTIONS: dict[str, Callable[[], Iterator[Cell]]] = {
    "decode": long_cells,
    "one sequence": one_cells,
    "kinds of decode": kind_cells,
    "latent decode": latent_cells,
    "tokens": paged_steps.token_cells,
    "mixed": paged_steps.mixed_cells,
    "append": append_cells,
    "prefill": prefill_cells,
    "decode, flash-attn3-jax": flash_attn3_cells,
}
