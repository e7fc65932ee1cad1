"""Tells `jax.experimental.roofline` what the passes of this library compute and move.

primitives.py imports this module where jax's roofline has been imported, which takes 20 ms and more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

from jax.experimental import roofline
from jax.extend.core import Primitive

from . import _jax
from .batching import leading
from .operands import DELTA, DIFFERENTIAL, TANGENT, Pass
from .spec import AttentionSpec, Spec, operand_names
from .visible.pairs import count


def _rule(context: Any, *shapes: Any, pass_: Pass, spec: Spec, **_: Any) -> Any:
    """The work of one call: FLOP by shapes, counted as `flops` does for unknown values; every operand is read once."""
    operands = dict(zip(operand_names(pass_, spec), shapes))
    unread = pass_.operands[pass_.in_full :] if pass_ is DELTA else pass_.operands[: pass_.in_place]
    if spec.value_dim:  # V is a part of K
        unread += ("value",)
    moved = [x.bytes for name, x in operands.items() if name not in unread]
    if pass_.in_place:  # these passes write no more than they are given
        moved += [operands[name].bytes for name in ("key", "value")]
    else:
        moved += [roofline.RooflineShape.from_aval(x).bytes for x in context.avals_out]
    work = _flops(pass_, spec, {name: x.shape for name, x in operands.items()})
    return roofline.RooflineResult(
        flops=work, unfused_flops=work, hbm_bytes=sum(moved), unfused_hbm_bytes=sum(moved)
    )


def _flops(pass_: Pass, spec: Spec, shapes: dict[str, tuple[int, ...]]) -> int:
    if not isinstance(spec, AttentionSpec):
        return 0
    if pass_ is DELTA:
        return 2 * math.prod(shapes["out"])
    lead = {name: leading(spec, name, len(shape)) for name, shape in shapes.items()}
    calls: int = math.prod(_jax.full_dim(x[axis] for x in shapes.values()) for axis in range(lead["query"]))
    name_of_work = TANGENT.name if pass_ is DIFFERENTIAL else pass_.name  # the pass that it is lowered to
    devices = spec.ring.size if spec.ring else 1  # each device does its share of the whole sequence
    core = {
        name: tuple(
            size * devices if dim in ("sq", "sk") else size
            for dim, size in zip(spec.dims[name], x[lead[name] :])
        )
        for name, x in shapes.items()
    }
    return calls * count(name_of_work, spec, core, {}) // devices


def register(primitives: Iterable[tuple[Pass, Primitive]]) -> None:
    """Registers the rules of these primitives, each of which runs one pass."""
    for pass_, primitive in primitives:
        roofline.register_roofline(primitive)(partial(_rule, pass_=pass_))
