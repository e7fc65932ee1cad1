"""Bytes of workspace that a CUDA call may need, from the spec and the shapes alone.

The device and its kernel are known only when the call runs, and sizes may be symbolic when it is lowered. So this is
an upper bound over all kernels that could run the call. The extension computes it (`workspace_bound` in
csrc/core/plan/plan.cc, from what each kernel family says of its passes), and the plan made at run time stays within
it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from . import _jax
from .backends import extension
from .batching import leading, named_sizes
from .spec import AttentionSpec


def workspace_bound(pass_: str, spec: AttentionSpec, shapes: dict[str, tuple[Any, ...]]) -> Any:
    """The size of the workspace result, in bytes.

    Args:
      pass_: "forward", "backward", "bias_gradient" or "tangent".
      spec: the call's static options.
      shapes: the shape of every operand by name; dimensions may be symbolic.

    Returns:
      An int, or a symbolic dimension. It holds the schedules of packed sequences' tiles; what segments leave to each
      tile; for a backward, dquery in float32, and dkey and dvalue if CTAs share key tiles; for few query rows, the
      partial results of split keys; for the forward, a tile counter and a boolean mask as bits.
    """
    core, _ = extension()
    assert core is not None  # the caller has asked for it
    count = leading(spec, "query", len(shapes["query"]))
    every = math.prod(_jax.full_dim(shape[axis] for shape in shapes.values()) for axis in range(count))
    sizes = named_sizes(spec, shapes)
    return core.workspace_bound(
        pass_, spec.plain_attributes(), sizes, every, mask_sizes(shapes, count, every)
    )


def mask_sizes(shapes: Mapping[str, tuple[Any, ...]], count: int, every: Any) -> tuple[Any, Any, Any]:
    """How many [rows, keys] arrays a boolean mask has, and their sizes; (0, 0, 0) without one.

    `count`: its leading dimensions. If one is not 1, the kernels keep an array for `every` leading entry of the call.
    """
    if "mask" not in shapes:
        return 0, 0, 0
    shape = shapes["mask"]
    batch, heads, rows, keys = shape[count:]
    alone = all(_jax.same_dim(size, 1) for size in shape[:count])
    return (1 if alone else every) * batch * heads, rows, keys
