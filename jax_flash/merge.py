"""`merge_attention`: combines attention over disjoint sets of keys."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import starmap

import jax.numpy as jnp
from jax import Array, lax

from ._jax import sharded_like
from .checker import Checker
from .options import ArrayLike

_INF = float("inf")


def merge_attention(outs: Sequence[ArrayLike], lses: Sequence[ArrayLike]) -> tuple[Array, Array]:
    """Combines attention over disjoint parts of the keys into attention over all of them.

    lse = log Σ exp(lse_n), out = Σ exp(lse_n − lse)·out_n, in plain JAX and float32; differentiable in every argument.
    A part without a visible key (lse = −inf) adds nothing. Sinks must be passed to one part only.

    Args:
      outs: one `[..., s, h, dv]` array per part.
      lses: one float32 `[..., h, s]` array per part, as `return_lse=True` returns it.

    Returns:
      out in the shape and dtype of `outs[0]`, and lse `[..., h, s]` in float32. Explicit mesh axes split both as they
      split the first part.

    Raises:
      TypeError: for a bare array instead of a list.
      ValueError: if the lists are empty or of different lengths, or if shapes do not match.

    Source: Dao et al., FlashAttention (2022), the combination of two blocks.

    Example:
      >>> first = flash_attention(q, k[:, :n], v[:, :n], return_lse=True)
      >>> rest = flash_attention(q, k[:, n:], v[:, n:], return_lse=True)
      >>> out, lse = merge_attention(*zip(first, rest))
    """
    for name, given in (("outs", outs), ("lses", lses)):
        if not isinstance(given, Iterable):
            raise TypeError(f"merge_attention: {name} must be a list or a tuple of arrays, got {given!r}")
        if hasattr(given, "shape"):
            raise TypeError(
                f"merge_attention: {name} must be a list or a tuple with one array for each part, got one array of "
                f"shape {jnp.shape(given)}; if its first dimension is the parts, pass list({name})"
            )
    check = Checker("merge_attention")
    parts = [check.array(f"outs[{n}]", out) for n, out in enumerate(outs)]
    part_lses = [check.array(f"lses[{n}]", lse) for n, lse in enumerate(lses)]
    _check(parts, part_lses)
    merged, lse = combine(parts, part_lses)
    return merged.astype(parts[0].dtype), lse


def combine(outs: Sequence[Array], lses: Sequence[Array]) -> tuple[Array, Array]:
    """merge_attention for checked parts, with out in float32, or in float64 if a part is."""
    wide = jnp.float64 if any(out.dtype == jnp.float64 for out in outs) else jnp.float32
    part = jnp.stack([sharded_like(lse, lses[0]).astype(wide) for lse in lses])  # [parts, ..., h, s]
    m = lax.stop_gradient(part.max(0, keepdims=True))
    m = jnp.where(m == -_INF, 0, m)
    e = jnp.exp(part - m)
    total = e.sum(0, keepdims=True)
    nothing = total == 0
    total = jnp.where(nothing, 1, total)
    lse = jnp.where(nothing, -_INF, m + jnp.log(total))
    weights = jnp.swapaxes(e / total, -1, -2)[..., None]  # [parts, ..., s, h, 1]
    empty = jnp.swapaxes(part == -_INF, -1, -2)[..., None]

    def weighted(weight: Array, empty: Array, out: Array) -> Array:
        seen = jnp.where(sharded_like(empty, outs[0]), 0, sharded_like(out, outs[0]).astype(wide))
        return sharded_like(weight, outs[0]) * seen

    each = zip(weights, empty, outs, strict=True)
    return reduce(operator.add, starmap(weighted, each)), lse[0]


def _check(outs: list[Array], lses: list[Array]) -> None:
    if not outs:
        raise ValueError("merge_attention: outs is empty; it needs at least one part")
    if len(outs) != len(lses):
        raise ValueError(f"merge_attention: lses has {len(lses)} parts, which is not outs' {len(outs)}")
    shape = outs[0].shape
    if len(shape) < 3:
        raise ValueError(f"merge_attention: outs[0] has shape {shape}; it must be [..., s, h, dv]")
    lse_shape = (*shape[:-3], shape[-2], shape[-3])
    for n, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.shape != shape:
            raise ValueError(
                f"merge_attention: outs[{n}] has shape {out.shape}, which is not outs[0]'s {shape}"
            )
        if lse.shape != lse_shape:
            raise ValueError(
                f"merge_attention: lses[{n}] has shape {lse.shape}; with outs of shape {shape} it must be"
                f" [..., h, s] = {lse_shape}"
            )
