"""Operands in shapes that CUDA kernels can load."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax.interpreters import mlir

from .backends import compute_capability, local_devices
from .operands import padded_head_dim
from .spec import Spec


def value_dim(spec: Spec, columns: int) -> int:
    """The head dim of V: spec.value_dim if set, else the columns of its operand."""
    return spec.value_dim or columns


def loads_rows(spec: Spec, shapes: dict[str, tuple[Any, ...]], head_dims: tuple[int, int]) -> bool:
    """Whether CUDA kernels can load the rows of a call in place, 16 bytes at a time."""
    places: tuple[int, ...] = head_dims
    if spec.value_dim:
        places = (*places, spec.value_start, shapes["key"][-1])
    return all(x == padded_head_dim(x) for x in places)


def with_padded_bias(
    ctx: mlir.LoweringRuleContext, at: int, values: tuple[Any, ...]
) -> tuple[mlir.LoweringRuleContext, tuple[Any, ...]]:
    """The operands, with a bias whose rows are multiples of 8 keys: others cannot be loaded 8 keys at a time, which
    Hopper's kernels for a bias need."""
    bias: Any = ctx.avals_in[at]
    columns = bias.shape[-1]
    devices = local_devices("cuda")
    hopper = not devices or any(compute_capability(device) // 10 == 9 for device in devices)
    if not hopper or not isinstance(columns, int) or columns == 1 or columns % 8 == 0:
        return ctx, values
    widths = [(0, 0)] * (bias.ndim - 1) + [(0, -columns % 8)]
    padded = bias.update(shape=(*bias.shape[:-1], columns + -columns % 8))
    pad = mlir.lower_fun(partial(jnp.pad, pad_width=widths), multiple_results=False)
    value = pad(ctx.replace(primitive=None, avals_in=[bias], avals_out=[padded]), values[at])
    avals = [*ctx.avals_in[:at], padded, *ctx.avals_in[at + 1 :]]
    return ctx.replace(avals_in=avals), (*values[:at], *value, *values[at + 1 :])
