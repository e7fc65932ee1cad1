"""Packed sequences over devices: a ring of one row with segment ids for its documents.

If queries and keys have the same offsets, every document has the diagonal of the whole row, so that its band and slopes
apply. Tokens outside every sequence see nothing, and nothing sees them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from ..offsets import owners, starts_of
from ..operands import FORWARD, OPTIONAL, WINDOW, Pass
from ..spec import AttentionSpec, Ring
from . import passes
from .shard import Call, Operands

_OF_SEQUENCES = ("cu_seqlens_q", "cu_seqlens_k", "kv_lengths")
_UNSEEN = -1, -2  # ids of queries and of keys outside every sequence


def may_be_ring(spec: AttentionSpec, shapes: Mapping[str, Sequence[Any]]) -> bool:
    """Whether a row of packed sequences may stay split. It may not if something depends on positions within each
    sequence: dropout's bits, ranges, a block mask, or a diagonal that is not the row's. Nor may it if each sequence has
    a window or slopes of its own."""
    if spec.layout != "varlen" or {"dropout", "ranges", "block_mask"} & {*spec.operands}:
        return False
    by_distance = [name for name in ("alibi_slopes", *WINDOW) if name in spec.operands]
    if any(shapes[name][spec.dims[name].index("n*") - len(spec.dims[name])] != 1 for name in by_distance):
        return False
    if not spec.limited and not by_distance:
        return True
    return spec.same_offsets and ("kv_lengths" not in spec.operands or spec.align == "top_left")


def run(pass_: Pass, spec: AttentionSpec, ring: Ring, operands: Operands, call: Call) -> list[Array]:
    """Runs `passes.run` on packed sequences."""
    queries, used, _ = _documents(operands["cu_seqlens_q"], operands["query"].shape[0], ring, "queries")
    keys, seen, place = _documents(operands["cu_seqlens_k"], operands["key"].shape[0], ring, "keys")
    if "kv_lengths" in operands and operands["kv_lengths"].shape[0] > 0:
        seen &= place < operands["kv_lengths"][keys - 1]
    in_use = {"tq": used, "tk": seen}
    made: Operands = {}
    for name, x in operands.items():
        dims = spec.dims[name]
        if dims[0] in in_use:
            made[name] = jnp.where(in_use[dims[0]][:, None, None], x, 0)[None]
        elif name == "lse":
            made[name] = jnp.where(used, x, -jnp.inf)[None]
        elif dims[-1] == "tq":
            made[name] = jnp.where(used, x, 0)[None]
        elif name == "sinks":
            made[name] = x[None]
        elif name not in _OF_SEQUENCES:
            made[name] = x
    made["q_segment_ids"] = jnp.where(used, queries, _UNSEEN[0])[None]
    made["kv_segment_ids"] = jnp.where(seen, keys, _UNSEEN[1])[None]
    names = tuple(name for name in OPTIONAL if name in made)
    row = replace(spec, layout="fixed", align="top_left", same_offsets=False, operands=names, ring=ring)
    results = [x[0] for x in passes.run(pass_, row, made, call)]
    if pass_ is FORWARD and "sinks" in operands:  # only rows of a sequence may see the sinks
        results[1] = jnp.where(used, results[1], -jnp.inf)
    return results


def _documents(offsets: Array, tokens: int, ring: Ring, of: str) -> tuple[Array, Array, Array]:
    """For each of this device's tokens: the number of its sequence, whether it has one, and its position in it."""
    shards = ring.shards(of)
    first = lax.axis_index(ring.axes) * tokens if shards > 1 else 0
    position = first + jnp.arange(tokens, dtype=jnp.int32)
    starts = starts_of(offsets, tokens * shards)
    document = owners(starts, position) + 1  # 0: before the first sequence
    return document, (document > 0) & (document < starts.shape[0]), position - starts[document - 1]
