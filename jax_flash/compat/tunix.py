"""Splash attention as tunix's models call it with `use_flash_attention=True`, in place of JAX's kernel for TPUs:

    from tunix.models.qwen3 import model
    from jax_flash.compat import tunix

    model.splash = tunix

Qwen 2 and 3 and Gemma 4 of tunix 0.1.7 then train and prefill here, sharded as their config says. Their decoding steps,
and the other models, compute scores in plain JAX, which this module does not replace. It does not import tunix.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..options import ArrayLike
from . import splash
from .splash import BlockSizes, SegmentIds

__all__ = ["BlockSizes", "PrefillKernel", "SegmentIds", "make_splash_mha"]


@partial(jax.tree_util.register_dataclass, data_fields=splash.DATA_FIELDS, meta_fields=splash.META_FIELDS)
@dataclass(frozen=True, eq=False)
class PrefillKernel(splash.SplashAttentionKernel):
    """A `SplashAttentionKernel` that gets a whole cache, and reads only as many keys as the mask has."""

    def __call__(
        self,
        q: ArrayLike,
        k: ArrayLike,
        v: ArrayLike,
        segment_ids: Any = None,
        sinks: ArrayLike | None = None,
    ) -> Any:
        k, v = (jnp.asarray(x)[:, : self.shape[2]] for x in (k, v))
        return super().__call__(q, k, v, segment_ids, sinks)


def make_splash_mha(mask: Any, **options: Any) -> PrefillKernel:
    """`jax_flash.compat.splash.make_splash_mha`, whose kernel takes longer arrays of keys than the mask has.

    For a prompt, tunix's Qwen models pass their whole cache, in which the prompt's keys come first.

    Args:
      mask, options: as in `jax_flash.compat.splash.make_splash_mha`.

    Returns:
      A `PrefillKernel`.

    Raises:
      ValueError, TypeError, NotImplementedError: as in `jax_flash.compat.splash.make_splash_mha`.

    Source: the interface is JAX's; the algorithm is Dao, FlashAttention-2 (2023).

    Example:
      >>> tunix.models.qwen3.model.splash = jax_flash.compat.tunix
    """
    return PrefillKernel(**vars(splash.make_splash_mha(mask, **options)))
