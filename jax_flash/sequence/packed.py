"""Packed sequences over devices: a ring of one row whose documents are told apart by segment ids.

Queries and keys have the same offsets, so that a document's diagonal is the row's. Tokens outside every sequence see
nothing and are not seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from ..operands import FORWARD, OPTIONAL, Pass
from ..spec import AttentionSpec, Ring
from . import passes
from .shard import Call, Operands

_OFFSETS = ("cu_seqlens_q", "cu_seqlens_k")
_BY_SEQUENCE = ("kv_lengths", "dropout")  # lengths and bits go by the position in each sequence
_UNSEEN = -1, -2  # ids of queries and of keys outside every sequence


def may_be_ring(spec: AttentionSpec, shapes: Mapping[str, Sequence[Any]]) -> bool:
    """Whether a row of packed sequences may stay split."""
    if (
        spec.layout != "varlen"
        or not spec.same_offsets
        or any(name in spec.operands for name in _BY_SEQUENCE)
    ):
        return False
    return "alibi_slopes" not in spec.operands or shapes["alibi_slopes"][-2] == 1


def run(pass_: Pass, spec: AttentionSpec, ring: Ring, operands: Operands, call: Call) -> list[Array]:
    """As `passes.run`, of a pass over packed sequences."""
    tokens = operands["query"].shape[0]
    position = lax.axis_index(ring.axes) * tokens + jnp.arange(tokens, dtype=jnp.int32)
    offsets = lax.cummax(jnp.clip(operands["cu_seqlens_q"], 0, tokens * ring.size))
    document = jnp.searchsorted(offsets, position, side="right").astype(jnp.int32)  # 0: before the first
    used = (document > 0) & (document < offsets.shape[0])
    made: Operands = {}
    for name, x in operands.items():
        dims = spec.dims[name]
        if dims[0] in ("tq", "tk"):
            made[name] = jnp.where(used[:, None, None], x, 0)[None]
        elif name == "lse":
            made[name] = jnp.where(used, x, -jnp.inf)[None]
        elif dims[-1] == "tq":
            made[name] = jnp.where(used, x, 0)[None]
        elif name not in _OFFSETS:
            made[name] = x
    for name, unseen in zip(("q_segment_ids", "kv_segment_ids"), _UNSEEN):
        made[name] = jnp.where(used, document, unseen)[None]
    names = tuple(name for name in OPTIONAL if name in made)
    row = replace(spec, layout="fixed", align="top_left", same_offsets=False, operands=names, ring=ring)
    results = [x[0] for x in passes.run(pass_, row, made, call)]
    if pass_ is FORWARD and "sinks" in operands:  # which rows of a sequence see, and others do not
        out, lse = results
        results = [out, jnp.where(used, lse, -jnp.inf)]
    return results
