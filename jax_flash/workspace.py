"""Bytes of workspace that a CUDA call may need, from the spec and the shapes alone.

The device and its kernel are known only when the call runs, and sizes may be symbolic when it is lowered: so this
is an upper bound in sums, products and floor divisions. `workspace_bound` in csrc/core/plan.cc is the same
formula, and the plan made at run time stays within it.
"""

from __future__ import annotations

import math
from typing import Any

from . import _compat
from .operands import DIMS
from .spec import AttentionSpec

_SMALLEST_BLOCK_M = 64  # query rows of the smallest tile in csrc/kernels.def
_TILE_WORK_BYTES = 32  # struct TileWork, csrc/core/plan.h


def workspace_bound(pass_: str, spec: AttentionSpec, shapes: dict[str, tuple[Any, ...]]) -> Any:
    """The size of the workspace result, in bytes.

    Args:
      pass_: "forward", "backward" or "bias_gradient".
      spec: the call's static options.
      shapes: the shape of every operand by name; dimensions may be symbolic.

    Returns:
      An int, or a symbolic dimension. 0 for unpacked queries, whose tiles follow from the block's number alone.
    """
    if not spec.layout.endswith("varlen") or pass_ != "forward":
        return 0
    dims = DIMS[spec.layout]
    count = len(shapes["query"]) - len(dims["query"])
    leading = math.prod(_full(shape[axis] for shape in shapes.values()) for axis in range(count))
    rows = shapes["query"][count]
    sequences = shapes["cu_seqlens_q"][-1] - 1
    # The schedule has one entry per tile: those of the sequences, and of the tokens before and after them all.
    schedule = (rows // _SMALLEST_BLOCK_M + sequences + 2) * _TILE_WORK_BYTES
    starts = 8 * (sequences + 2)  # int32 [n + 3] of the queries and [n + 1] of the keys
    return leading * (schedule + starts)


def _full(sizes: Any) -> Any:
    """A leading dimension's size: each operand has it whole or 1."""
    return next((size for size in sizes if not _compat.same_dim(size, 1)), 1)
