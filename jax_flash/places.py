"""Where the rows and columns of S lie: their sequence, their position in it, and the row's diagonal."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from .offsets import starts_of
from .spec import AttentionSpec


@dataclass(frozen=True)
class Place:
    """The positions of the rows and columns of S; b is 1 where nothing depends on the batch entry."""

    sequence: Array  # [b, sq | 1]  batch entry or sequence, the index into dropout and alibi
    row: Array  # [b, sq]  i, the position within the sequence
    column: Array  # [b, sk]  j
    diagonal: Array  # [b, sq]  c(i)
    row_used: Array  # [b, sq]  i < nq
    rows: Array  # [b, sq | 1]  nq
    new: Array  # [b, sq | 1]  nk − nq, the first of the sequence's new tokens among its keys
    column_used: Array  # [b, sk]  j < nk
    segments: tuple[Array, Array] | None  # [b, sq], [b, sk]  a row sees keys of its own segment only


def place_fixed(spec: AttentionSpec, operands: dict[str, Array]) -> Place:
    b, sq = operands["query"].shape[:2]
    sk = operands["key"].shape[1]
    nq = _length(operands.get("q_lengths"), sq)
    nk = _length(operands.get("kv_lengths"), sk)
    row, column = _iota(sq)[None], _iota(sk)[None]
    segments = None
    if "q_segment_ids" in operands:
        segments = operands["q_segment_ids"], operands["kv_segment_ids"]
    return Place(
        sequence=_iota(b)[:, None],
        row=row,
        column=column,
        diagonal=_diagonal(spec, operands, row, nq, nk),
        row_used=row < nq,
        rows=nq,
        new=nk - nq,
        column_used=column < nk,
        segments=segments,
    )


def place_varlen(spec: AttentionSpec, operands: dict[str, Array]) -> Place:
    cu_q, z_q, row = _locate(operands["cu_seqlens_q"], operands["query"].shape[0])
    cu_k, z_k, column = _locate(operands["cu_seqlens_k"], operands["key"].shape[0])
    outside = cu_q.shape[0] - 1  # tokens outside every sequence form one more sequence, of length 0
    nq = jnp.diff(cu_q, append=cu_q[-1:])
    nk = jnp.diff(cu_k, append=cu_k[-1:])
    if "kv_lengths" in operands:
        nk = jnp.minimum(nk, jnp.append(jnp.maximum(operands["kv_lengths"], 0), jnp.int32(0)))
    return Place(
        sequence=z_q[None],
        row=row[None],
        column=column[None],
        diagonal=_diagonal(spec, operands, row, nq[z_q], nk[z_q])[None],
        row_used=(z_q < outside)[None],
        rows=nq[z_q][None],
        new=(nk - nq)[z_q][None],
        column_used=(column < nk[z_k])[None],
        segments=(z_q[None], z_k[None]),
    )


def _locate(cu_seqlens: Array, tokens: int) -> tuple[Array, Array, Array]:
    """Monotone cu_seqlens `[n + 1]`; per token `[tokens]` its sequence (n if outside all) and position in it."""
    cu = starts_of(cu_seqlens, tokens)
    n = cu.shape[0] - 1
    token = _iota(tokens)
    z = jnp.sum(cu[:, None] <= token[None], axis=0, dtype=jnp.int32) - 1
    z = jnp.where(z < 0, n, z)
    return cu, z, token - cu[z]


def _length(lengths: Array | None, size: int) -> Array:
    """The number of rows in use, `[b, 1]`, or `[1, 1]` if all are."""
    if lengths is None:
        return jnp.full((1, 1), size, jnp.int32)
    return jnp.clip(lengths, 0, size)[:, None]


def _diagonal(spec: AttentionSpec, operands: dict[str, Array], row: Array, nq: Array, nk: Array) -> Array:
    """c(i): the key of this call on the diagonal of row i."""
    diagonal = row + (nk - nq) if spec.align == "bottom_right" else row
    return diagonal + first_offset(operands)


def first_offset(operands: dict[str, Array]) -> Array | int:
    """How far the call's first query lies behind its first key, in the sequence that the call is a part of."""
    position = operands.get("position")
    return 0 if position is None else position[0] - position[1]


def _iota(n: int) -> Array:
    return jnp.arange(n, dtype=jnp.int32)
