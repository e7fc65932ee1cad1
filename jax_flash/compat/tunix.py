"""Splash attention as tunix's models call it with `use_flash_attention=True`, in place of JAX's kernel for TPUs:

    from tunix.models.qwen3 import model
    from jax_flash.compat import tunix

    tunix.patch(model)

Qwen 2 and 3 and Gemma 4 of tunix 0.1.7 then train and prefill here, sharded as their config says. Their decoding steps,
and the other models, compute scores in plain JAX, which this module does not replace. It does not import tunix.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from ..checker import Checker
from ..options import ArrayLike
from . import splash_kernel
from .arguments import SegmentIds
from .splash_kernel import BlockSizes, SplashAttentionKernel

__all__ = ["BlockSizes", "PrefillKernel", "SegmentIds", "make_splash_mha", "patch"]


def patch(model: ModuleType) -> None:
    """Puts this module in the place of `splash` in the modules of one of tunix's models.

    Args:
      model: `tunix.models.qwen3.model`, or that of another model. Newer versions call `splash` in a module beside it,
        such as Gemma 4's `attention`.

    Raises:
      NotImplementedError: if no module of the model has `splash`, as with models that compute scores in plain JAX.

    Example:
      >>> jax_flash.compat.tunix.patch(tunix.models.qwen3.model)
    """
    package = f"{model.__package__}."
    loaded = list(sys.modules.items())
    found = [x for name, x in loaded if f"{name}.".startswith(package) and hasattr(x, "splash")]
    if not found:
        raise Checker("tunix.patch").fail(
            f"no module of {model.__package__} has splash, JAX's Splash attention; this version of the model computes "
            "attention elsewhere",
            NotImplementedError,
        )
    for x in found:
        setattr(x, "splash", sys.modules[__name__])  # noqa: B010


@partial(
    jax.tree_util.register_dataclass,
    data_fields=splash_kernel.DATA_FIELDS,
    meta_fields=splash_kernel.META_FIELDS,
)
@dataclass(frozen=True, eq=False)
class PrefillKernel(SplashAttentionKernel):
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
      >>> jax_flash.compat.tunix.patch(tunix.models.qwen3.model)
    """
    return PrefillKernel(**vars(splash_kernel.make_splash_mha(mask, **options)))
