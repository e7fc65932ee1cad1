"""The references of Splash attention, `make_masked_mha_reference` and `make_masked_mqa_reference`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array

from ..checker import Checker
from ..options import ArrayLike, Implementation, Number
from .splash_kernel import (
    SplashAttentionKernel,
    make_splash_mha_single_device,
    make_splash_mqa_single_device,
)

_CHECK = Checker("splash")
_BACKWARD = ("vanilla", "custom", "custom_vanilla")


def make_masked_mha_reference(
    mask: Any, backward_impl: str = "vanilla", *, implementation: Implementation | None = None
) -> Callable[..., Any]:
    """Splash attention in float32, with the arguments of `make_masked_mha_reference` of JAX's Splash attention.

    Args:
      mask: as in `make_splash_mha`.
      backward_impl: "vanilla", "custom" or "custom_vanilla", without effect: there is one backward.
      implementation: as in `flash_attention`. "xla" is plain JAX, which stores the scores, as JAX's reference does.

    Returns:
      A function `reference(q, k, v, segment_ids=None, sinks=None, *, mask_value, save_residuals=False,
      attn_logits_soft_cap=None)`, with the arrays of `SplashAttentionKernel`; mask_value has no effect. Arrays of
      other dtypes are converted to float32, the dtype of its result `[hq, sq, dv]`; with save_residuals it returns the
      pair `(out, (logsumexp,))`. Gradients have the dtypes of their arrays.

    Raises:
      ValueError, TypeError, NotImplementedError: as in `make_splash_mha`.

    One deviation: a query without a visible key gives 0 and −inf, not the mean of all values and a large number.

    Source: the interface is JAX's.

    Example:
      >>> mask = MultiHeadMask([CausalMask((s, s)) for _ in range(heads)])
      >>> wanted = jax.vmap(make_masked_mha_reference(mask))(q / d**0.5, k, v)
    """
    return _reference(make_splash_mha_single_device(mask, implementation=implementation), backward_impl)


def make_masked_mqa_reference(
    mask: Any, backward_impl: str = "vanilla", *, implementation: Implementation | None = None
) -> Callable[..., Any]:
    """`make_masked_mha_reference` for keys and values of one head, passed without a dimension for it: `[sk, d]`,
    `[sk, dv]`."""
    return _reference(make_splash_mqa_single_device(mask, implementation=implementation), backward_impl)


def _reference(kernel: SplashAttentionKernel, backward_impl: Any) -> Callable[..., Any]:
    _CHECK.one_of("backward_impl", backward_impl, _BACKWARD)
    return partial(_call, kernel)


def _call(
    kernel: SplashAttentionKernel,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    segment_ids: Any = None,
    sinks: ArrayLike | None = None,
    *,
    mask_value: float | None = None,
    save_residuals: bool = False,
    attn_logits_soft_cap: Number | None = None,
) -> Any:
    del mask_value
    residuals = _CHECK.flag("save_residuals", save_residuals)
    run = replace(kernel, save_residuals=residuals, softcap=attn_logits_soft_cap)
    return run(_float32("q", q), _float32("k", k), _float32("v", v), segment_ids, sinks)


def _float32(name: str, x: ArrayLike) -> Array:
    """x in float32; the kernel refuses integers by name."""
    array = _CHECK.array(name, x)
    return array.astype(jnp.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array
