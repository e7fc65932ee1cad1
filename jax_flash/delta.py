"""delta = rowsum(dO ∘ O), from which the backward passes start.

XLA's sum is as fast as a kernel of our own, but its order of additions, and so its last bits, may differ from process
to process, because XLA tunes the fusion for GPUs. Deterministic calls therefore run the custom call `jax_flash_delta`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import mlir

from . import _jax
from .operands import DELTA
from .spec import AttentionSpec

_OFFSETS = ("cu_seqlens_q", "cu_seqlens_k")


def delta_spec(spec: AttentionSpec) -> AttentionSpec:
    """The spec of a call's delta. It keeps only offsets, because each row is computed alone, on its own device."""
    return replace(spec, operands=tuple(name for name in spec.operands if name in _OFFSETS), ring=None)


@partial(jax.jit, inline=True)  # outside jit, JAX would trace platform_dependent in every call
def row_products(x: jax.Array, y: jax.Array, finite: jax.Array | None = None) -> jax.Array:
    """Σ x·y of the rows of two […, s, h, dv] in lse's order, […, h, s]; NaN where a row of `finite` […, s, h, d] is
    not. Nothing else is computed from the sums here, because XLA would need a second kernel for it on a GPU."""
    x, y = _jax.sharded_like(x, y).astype(jnp.float32), y.astype(jnp.float32)
    usable = None if finite is None else jnp.isfinite(_jax.sharded_like(finite, y))
    if usable is not None and usable.shape == x.shape:  # the sums of NaN: one pass over all three on a GPU
        x, usable = jnp.where(usable, x, jnp.nan), None
    sums = jax.lax.platform_dependent(x, y, cpu=_row_dots, default=lambda x, y: (x * y).sum(-1))
    if usable is not None:
        sums = jnp.where(usable.all(-1), sums, jnp.nan)
    return jnp.swapaxes(sums, -1, -2)


def _row_dots(x: jax.Array, y: jax.Array) -> jax.Array:
    """For CPUs: XLA turns a plain sum into a library call that wakes threads, often so late that the next call, the
    backward pass, starts milliseconds late."""
    return jnp.einsum("...d,...d->...", x, y, precision=jax.lax.Precision.HIGHEST)


def lower(ctx: mlir.LoweringRuleContext, *values: Any, platform: str) -> Any:
    """The custom call of O and dO on CUDA; XLA's sum on CPUs."""
    pair = slice(DELTA.in_full)  # out and dout
    if platform == "cuda":
        call = jax.ffi.ffi_lowering(f"jax_flash_{DELTA.name}")
        return call(ctx.replace(avals_in=ctx.avals_in[pair]), *values[pair])
    return mlir.lower_fun(lambda *arrays: [row_products(*arrays[pair])], multiple_results=True)(ctx, *values)
