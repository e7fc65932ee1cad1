"""Bytes of workspace that a CUDA call may need, from the spec and the shapes alone.

The device and its kernel are known only when the call runs, and sizes may be symbolic when it is lowered. So this is
an upper bound over all kernels that could run the call. The extension computes it (`workspace_bound` in
csrc/core/plan/plan.cc, from what each kernel family says of its passes), and the plan made at run time stays within
it.
"""

from __future__ import annotations

import math
from typing import Any

from . import _jax
from .backends import extension
from .operands import DIMS, operand_bits
from .spec import AttentionSpec


def workspace_bound(pass_: str, spec: AttentionSpec, shapes: dict[str, tuple[Any, ...]]) -> Any:
    """The size of the workspace result, in bytes.

    Args:
      pass_: "forward", "backward", "bias_gradient" or "tangent".
      spec: the call's static options.
      shapes: the shape of every operand by name; dimensions may be symbolic.

    Returns:
      An int, or a symbolic dimension. It holds the schedules of packed sequences' tiles; what segments leave to each
      tile; for a backward that need not be deterministic, dquery in float32; for few query rows, the partial results
      of split keys; for the forward, a tile counter.
    """
    core, _ = extension()
    assert core is not None  # the caller has asked for it
    return core.workspace_bound(pass_=pass_, **_sizes(spec, shapes), **_options(spec))


def _sizes(spec: AttentionSpec, shapes: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    count = len(shapes["query"]) - len(DIMS[spec.layout]["query"])
    named = {
        dim: size
        for name in ("query", "key", "value", "cu_seqlens_q", "block_tables")
        if name in shapes
        for dim, size in zip(spec.dims[name], shapes[name][count:])
    }
    packed = spec.layout.endswith("varlen")
    return {
        "leading": math.prod(
            _jax.full_dim(shape[axis] for shape in shapes.values()) for axis in range(count)
        ),
        "batch": named["n1"] - 1 if packed else named["n" if spec.paged else "b"],
        "q_rows": named["tq" if packed else "sq"],
        "k_rows": named["pages"] * named["ps"] if spec.paged else named["tk" if packed else "sk"],
        "heads": named["hq"],
        "kv_heads": named["hk"],
        "d": named["d"],
        "dv": spec.value_dim or named["dv"],
        "draft_rows": shapes["draft_mask"][-1] if "draft_mask" in shapes else 0,
    }


def _options(spec: AttentionSpec) -> dict[str, Any]:
    """Those that decide about the workspace."""
    return {
        "varlen": spec.layout.endswith("varlen"),
        "paged": spec.paged,
        "deterministic": spec.deterministic,
        "num_splits": spec.num_splits,
        "batch_invariant": spec.batch_invariant,
        "value_dim": spec.value_dim,
        "operands": operand_bits(spec.operands),
    }
