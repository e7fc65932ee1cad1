"""Bands of masks as bands of a call: numbers go to its spec, arrays to its operands, and plain kernels run both."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import Array

from ..masks import Mask
from ..spec import UNLIMITED, AttentionSpec, Ring, narrower
from . import forms
from .forms import Form
from .rows import MOST, Data

_SIDES = ("left", "right")


def without_numbers(mask: Mask, spec: AttentionSpec) -> tuple[Mask, AttentionSpec]:
    """Moves bands of Python ints from the mask to the spec if it can hold them.

    They are aligned to the top left, so a band of the call itself, and ALiBi, must be so too.
    """
    if spec.align != "top_left" and (spec.limited or "alibi_slopes" in spec.operands):
        return mask, spec
    rest = []
    left, right = spec.left, spec.right
    for condition in mask.conditions:
        sides = _static_sides(condition)
        if sides is None:
            rest.append(condition)
            continue
        left, right = (narrower(a, b) for a, b in zip((left, right), sides))
    if len(rest) == len(mask.conditions):
        return mask, spec
    return Mask(tuple(rest)), replace(spec, left=left, right=right, align="top_left")


def _static_sides(condition: Form) -> tuple[int, int] | None:
    """Keys to the left and to the right of the diagonal, if they are numbers that a spec can have."""
    if not isinstance(condition, forms.Band) or not isinstance(condition.offset, int):
        return None
    found = []
    for side, toward in ((condition.left, -1), (condition.right, 1)):
        if side is None:
            found.append(UNLIMITED)
        elif isinstance(side, int) and 0 <= side + toward * condition.offset < MOST:
            found.append(side + toward * condition.offset)
        else:
            return None
    return found[0], found[1]


def without_arrays(
    mask: Mask, spec: AttentionSpec, ring: Ring | None
) -> tuple[Mask, AttentionSpec, dict[str, Data]]:
    """Moves a band of arrays from the mask to operands, whose values it returns by name.

    A call has one diagonal, so it has no second band of arrays, and no band or slopes around another diagonal. Blocks
    have kernels without such operands, and the calls of a ring move their bands already.
    """
    bands = [x for x in mask.conditions if isinstance(x, forms.Band)]
    blocks = any(isinstance(x, forms.Blocks) for x in mask.conditions)
    if len(bands) != 1 or blocks or ring is not None or "alibi_slopes" in spec.operands:
        return mask, spec, {}
    (band,) = bands
    own_offset = not isinstance(band.offset, int) or band.offset != 0
    if spec.limited and (own_offset or spec.align != "top_left"):
        return mask, spec, {}
    limits: dict[str, Any] = {"align": "top_left"}
    operands: dict[str, Data] = {"window_offset": band.offset} if own_offset else {}
    for name in _SIDES:
        side, of_call = getattr(band, name), getattr(spec, name)
        if side is None:
            continue
        if isinstance(side, int) and 0 <= side < MOST:
            limits[name] = narrower(of_call, int(side))
        elif of_call == UNLIMITED:
            operands["window_" + name] = side
        else:
            return mask, spec, {}
    return Mask(tuple(x for x in mask.conditions if x is not band)), replace(spec, **limits), operands


def operand(x: Data) -> Array:
    """An operand `window_…`, int32 [b] or [1]."""
    return jnp.asarray(x, jnp.int32).reshape(-1)
