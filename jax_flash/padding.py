"""Operands in shapes that CUDA kernels can load."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax.interpreters import mlir

from . import _jax
from .backends import compute_capability, local_devices
from .operands import whole_chunks
from .spec import Spec


def value_dim(spec: Spec, columns: int) -> int:
    """The head dim of V: spec.value_dim if set, else the columns of its operand."""
    return spec.value_dim or columns


def loads_rows(spec: Spec, shapes: dict[str, tuple[Any, ...]], head_dims: tuple[int, int]) -> bool:
    """Whether CUDA kernels can load the rows of a call in place, 16 bytes at a time."""
    places: tuple[int, ...] = head_dims
    if spec.value_dim:
        places = (*places, spec.value_start, shapes["key"][-1])
    return all(x == whole_chunks(x) for x in places)


def bias_columns(columns: Any, capabilities: Sequence[int]) -> Any:
    """The columns of a bias that CUDA kernels are called with: whole chunks of 8 keys, which only Hopper's need."""
    padded = any(capability // 10 == 9 for capability in capabilities)
    return whole_chunks(columns) if padded and isinstance(columns, int) and columns > 1 else columns


def with_padded_bias(
    ctx: mlir.LoweringRuleContext, at: int, values: tuple[Any, ...]
) -> tuple[mlir.LoweringRuleContext, tuple[Any, ...]]:
    """The operands, the bias with bias_columns(). A program that is lowered without a GPU may run on Hopper."""
    bias: Any = ctx.avals_in[at]
    own = bias.shape[-1]
    columns = bias_columns(own, [compute_capability(x) for x in local_devices("cuda")] or [90])
    if _jax.same_dim(columns, own):
        return ctx, values
    widths = [(0, 0)] * (bias.ndim - 1) + [(0, columns - own)]
    padded = bias.update(shape=(*bias.shape[:-1], columns))
    pad = mlir.lower_fun(partial(jnp.pad, pad_width=widths), multiple_results=False)
    value = pad(ctx.replace(primitive=None, avals_in=[bias], avals_out=[padded]), values[at])
    avals = [*ctx.avals_in[:at], padded, *ctx.avals_in[at + 1 :]]
    return ctx.replace(avals_in=avals), (*values[:at], *value, *values[at + 1 :])
