"""Bytes of workspace that a CUDA call may need, from the spec and the shapes alone.

The device and its kernel are known only when the call runs, and sizes may be symbolic when it is lowered: so this
is an upper bound in sums, products and floor divisions. `workspace_bound` in csrc/core/plan.cc is the same
formula, and the plan made at run time stays within it.
"""

from __future__ import annotations

import math
from typing import Any

from . import _jax
from .operands import DIMS
from .spec import AttentionSpec

_SMALLEST_BLOCK = 16  # rows of the smallest tile in csrc/kernels.def
_TILE_WORK_BYTES = 32  # struct TileWork, csrc/core/plan.h
_COLUMNS = 16  # of the accumulator of dquery: whole blocks
_ALIGNMENT = 256  # of the parts of the workspace
_COUNTER_BYTES = 4  # of tiles taken, where blocks share them out
# Those of csrc/core/plan.h and split.h with these names.
_DECODE_ROWS, _DECODE_CHUNK, _DECODE_TILE, _DECODE_BLOCKS, _DECODE_PART = 64, 16, 64, 1024, 2048
_DECODE_TARGET_BYTES, _MAX_SPLITS = 24, 256


def workspace_bound(pass_: str, spec: AttentionSpec, shapes: dict[str, tuple[Any, ...]]) -> Any:
    """The size of the workspace result, in bytes.

    Args:
      pass_: "forward", "backward" or "bias_gradient".
      spec: the call's static options.
      shapes: the shape of every operand by name; dimensions may be symbolic.

    Returns:
      An int, or a symbolic dimension: with packed sequences the schedules of their tiles, for a backward that need
      not be deterministic dquery in float32, its head dim rounded up to whole blocks, for few query rows what the
      parts of their keys leave, and for the forward a counter of tiles.
    """
    dims = DIMS[spec.layout]
    count = len(shapes["query"]) - len(dims["query"])
    leading = math.prod(_jax.full_dim(shape[axis] for shape in shapes.values()) for axis in range(count))
    backward = pass_ == "backward"
    parts = []
    if spec.layout.endswith("varlen"):
        scheduled = ["key"] if backward else []
        scheduled += ["query"] if not backward or spec.deterministic else []
        sequences = shapes["cu_seqlens_q"][-1] - 1
        parts += [leading * _schedule(shapes[name][count], sequences) for name in scheduled]
    if backward and not spec.deterministic:
        *rows, head_dim = shapes["query"][count:]
        parts.append(4 * leading * math.prod(rows) * (-(-head_dim // _COLUMNS) * _COLUMNS))
    if pass_ == "forward" and spec.layout != "varlen":
        parts.append(_decode(spec, shapes, leading, count))
    if pass_ == "forward":
        parts.append(_COUNTER_BYTES)
    return sum(_aligned(part) for part in parts)


def _decode(spec: AttentionSpec, shapes: dict[str, tuple[Any, ...]], leading: Any, count: int) -> Any:
    """O, two statistics and a target for every row of every part: a bound of shapes as far as they are known."""
    sizes = {
        dim: size
        for name in ("query", "key", "value", "block_tables")
        if name in shapes
        for dim, size in zip(spec.dims[name], shapes[name][count:])
    }
    heads, kv_heads = sizes["hq"], sizes["hk"]
    tokens = 1 if spec.layout == "paged_varlen" else sizes["sq"]  # that decode takes together, at least
    rows = tokens * (heads // kv_heads if isinstance(kv_heads, int) and kv_heads else heads)
    if isinstance(rows, int) and rows > _DECODE_ROWS:
        return 0
    rows = (rows if isinstance(rows, int) else _DECODE_ROWS) + _DECODE_CHUNK - 1
    keys = sizes["pages"] * sizes["ps"] if spec.paged else sizes["sk"]
    sequences = shapes["cu_seqlens_q"][-1] - 1 if spec.layout == "paged_varlen" else shapes["query"][count]
    column_rows = leading * sequences * kv_heads * rows
    if spec.num_splits:
        part_rows = column_rows * min(spec.num_splits, _MAX_SPLITS)
    elif spec.batch_invariant:
        part_rows = column_rows * (keys // _DECODE_PART + 1)
    else:
        part_rows = column_rows * (keys // _DECODE_TILE + 1)
        most = _DECODE_BLOCKS * _DECODE_CHUNK
        part_rows = 2 * (min(most, part_rows) if isinstance(part_rows, int) else most)
    return part_rows * (4 * sizes["dv"] + 8 + _DECODE_TARGET_BYTES)


def _schedule(rows: Any, sequences: Any) -> Any:
    """One entry per tile: those of the sequences, and of the tokens before and after them all; then the starts."""
    entries = rows // _SMALLEST_BLOCK + sequences + 2
    starts = 8 * (sequences + 2)  # int32 [n + 3] of the rows in question and [n + 1] of the others
    return entries * _TILE_WORK_BYTES + starts


def _aligned(size: Any) -> Any:
    return (size + (_ALIGNMENT - 1)) // _ALIGNMENT * _ALIGNMENT
