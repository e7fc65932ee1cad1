"""Paged calls of several tokens: speculative decoding with and without a tree's draft mask, and mixed batches.

The "times" of a cell are those of one call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_flash

from . import decode_calls, measure
from .bars import Cell

SHAPE = (64, 32, 8, 128, 8192)  # sequences, query and KV heads, head dim, keys
TOKENS = (1, 4, 8, 16)
# A mixed batch: the number of prompt chunks, the tokens of each, and the number of sequences with a single token.
CHUNKS, CHUNK, DECODES = 4, 2048, 60
PAGE = 64


def tree(tokens: int, sequences: int) -> jax.Array:
    """The draft mask of a random tree for each sequence, parents before children."""
    rng = np.random.default_rng(tokens)
    mask = np.zeros((sequences, tokens, tokens), bool)
    for of_sequence in mask:
        for token in range(tokens):
            if token:
                of_sequence[token] = of_sequence[rng.integers(token)]
            of_sequence[token, token] = True
    return jnp.asarray(mask)


def token_cells() -> Iterator[Cell]:
    """Several new tokens of each sequence, causal and as a tree."""
    q, k, v = decode_calls.draw(SHAPE)
    arrays = decode_calls.scattered(k, v, PAGE)
    calls: measure.Calls = {}
    for tokens in TOKENS:
        queries = jnp.repeat(q, tokens, axis=1)
        calls[f"{tokens}"] = _chain(causal=True), [(queries, *arrays)]
        calls[f"{tokens}, tree"] = _chain(draft_mask=tree(tokens, SHAPE[0])), [(queries, *arrays)]
    times = measure.of_one(measure.in_turns(calls), decode_calls.CHAIN)
    b, hq, hk, d, keys = SHAPE
    yield {"kind": "tokens", "name": f"tokens b{b} {hq}/{hk} d{d} kv{keys}", "times": times}


def _chain(**options: Any) -> measure.Call:
    return measure.chained(lambda *x: jax_flash.paged_attention(*x, **options), decode_calls.CHAIN)


def mixed_cells() -> Iterator[Cell]:
    """Chunks of prompts and single tokens packed into one call, and a call for each of the two."""
    _, hq, hk, d, keys = SHAPE
    for heads, dim in (((hq, hk), d), ((hq, hk), 64), ((16, 8), 256)):
        whole = _packed((CHUNK,) * CHUNKS + (1,) * DECODES, heads, dim, keys)
        tokens = CHUNK * CHUNKS
        query, k, v, tables, lengths, starts = whole
        arguments = {
            "together": whole,
            "chunks": (query[:tokens], k, v, tables[:CHUNKS], lengths[:CHUNKS], starts[: CHUNKS + 1]),
            "tokens": (
                query[tokens:],
                k,
                v,
                tables[CHUNKS:],
                lengths[CHUNKS:],
                starts[CHUNKS:] - tokens,
            ),
        }
        times = measure.in_turns({name: (_packed_call, [x]) for name, x in arguments.items()})
        name = f"mixed {CHUNKS} × {CHUNK} and {DECODES} × 1, {heads[0]}/{heads[1]} d{dim} kv{keys}"
        yield {"kind": "mixed", "name": name, "d": dim, "times": times}


@jax.jit
def _packed_call(query: jax.Array, *arrays: jax.Array) -> jax.Array:
    *paged, starts = arrays
    return jax_flash.paged_attention(query, *paged, cu_seqlens_q=starts, causal=True)


def _packed(tokens: tuple[int, ...], heads: tuple[int, int], d: int, keys: int) -> tuple[jax.Array, ...]:
    """Query, pools, tables, lengths and offsets of sequences with these new tokens and keys."""
    hq, hk = heads
    k, v = (jax.random.normal(jax.random.key(i), (len(tokens), keys, hk, d), "bfloat16") for i in range(2))
    starts = jnp.asarray(np.cumsum([0, *tokens]), jnp.int32)
    query = jax.random.normal(jax.random.key(2), (sum(tokens), hq, d), "bfloat16")
    return (query, *decode_calls.scattered(k, v, PAGE), starts)


def verdict(cell: Cell) -> str:
    return ", ".join(f"{name}: {x:.3f}" for name, x in ratios(cell).items())


def ratios(cell: Cell) -> dict[str, float]:
    """The time of a mixed batch over its parts, of several tokens over one, and of a tree over a chain of as many."""
    time = {name: times["median"] for name, times in cell["times"].items()}
    if cell["kind"] == "mixed":
        return {"together / apart": time["together"] / (time["chunks"] + time["tokens"])}
    found = {f"{n} tokens / 1": time[f"{n}"] / time["1"] for n in TOKENS[1:]}
    return found | {f"tree of {n} / {n} tokens": time[f"{n}, tree"] / time[f"{n}"] for n in TOKENS}
