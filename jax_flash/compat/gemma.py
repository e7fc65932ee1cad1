"""The attention of google-deepmind's `gemma`, whose `Attention` modules run here after one line:

    from gemma.gm.nn import _modules
    from jax_flash.compat import gemma

    gemma.patch(_modules.Attention)  # of Gemma 2 and 3; those of gemma.gm.nn.gemma3n and gemma.gm.nn.gemma4 likewise

Text, images, sliding windows, soft caps, the cache with padded prompts, and caches that layers share keep their
meaning, and checkpoints their parameters. It holds for gemma 4.0.1. This module imports neither Flax nor gemma.
"""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .. import masks
from ..attention import flash_attention
from ..checker import Checker
from ..masks import Mask
from ..options import Implementation

_CHECK = Checker("gemma.patch")
_Cache = dict[str, Array]
_HIDDEN = -2.3819763e38  # gemma's K_MASK


def patch(*modules: type, ranges: bool = False, implementation: Implementation | None = None) -> None:
    """Lets `Attention` classes of gemma compute attention here, also in models that already exist.

    Args:
      modules: `Attention` of `gemma.gm.nn._modules`, `gemma.gm.nn.gemma3n._modules` or `gemma.gm.nn.gemma4._modules`.
      ranges: whether each row of every mask sees at most two ranges of keys. Kernels then read O(rows) numbers instead
        of gemma's dense mask. This holds for training on text and images, for prompts, and for the steps after one
        prompt; a conversation of several padded turns has more ranges. A row with more gives NaN.
      implementation: as in `flash_attention`.

    Raises:
      TypeError: for a class that is not such a module.
      ValueError, TypeError: when the module is called, as in `flash_attention`, and for a local layer without
        sliding_window_size.

    Deviations from gemma: a query that sees no key gives 0, not the mean of the values. gemma's captured
    `attention_weights` are computed by plain JAX in addition, where the collection `intermediates` is mutable.
    """
    _CHECK.flag("ranges", ranges)
    for module in modules:
        if not (isinstance(module, type) and hasattr(module, "use_gqa") and _takes_gemmas_arguments(module)):
            raise _CHECK.fail(f"modules must be Attention classes of gemma, got {module!r}", TypeError)
        # Flax wraps a module's methods when its class is created, but not methods that are assigned later.
        made: Any = type(module.__name__, (module,), {"__call__": _method(ranges, implementation)})
        setattr(module, "__call__", made.__call__)  # noqa: B010


def _takes_gemmas_arguments(module: Any) -> bool:
    names = [*inspect.signature(module.__call__).parameters]
    return names[1:5] == ["x", "segment_pos", "cache", "attn_mask"]


def _method(ranges: bool, implementation: Implementation | None) -> Any:
    def __call__(
        self: Any,
        x: Array,
        segment_pos: Array,
        cache: _Cache | None,
        attn_mask: Array,
        kv_shared_cache: _Cache | None = None,
        skip_sliding_mask: bool = False,  # of Gemma 4 after gemma 4.0.1
    ) -> tuple[_Cache | None, Array]:
        """gemma's Attention: x `[b, t, features]`, attn_mask `[b, t, keys]` → (new cache, `[b, t, features]`)."""
        query, key, value = _projected(self, x, segment_pos, kv_shared_cache)
        positions = segment_pos
        if cache is not None:
            store = _store(self, cache, x.shape[1])
            positions = store("positions", segment_pos)
            if kv_shared_cache is None:
                key, value = store("k", key), store("v", value)
        elif kv_shared_cache is not None:
            positions = kv_shared_cache.get("positions", segment_pos)
        seen = attn_mask.astype(bool)
        if getattr(self.attn_type, "name", "") == "LOCAL_SLIDING" and not skip_sliding_mask:
            if self.sliding_window_size is None:
                raise _CHECK.fail("a LOCAL_SLIDING layer needs sliding_window_size, got None")
            distance = positions[:, None] - segment_pos[..., None]
            seen &= jnp.abs(distance) < self.sliding_window_size
        if hasattr(self, "attention_weights") and self.is_mutable_collection("intermediates"):
            self.attention_weights(_weights(self, query, key, seen))
        many = None
        mask = masks.dense(seen[:, None])
        if ranges and seen.shape[1] > 1:  # for a single row the mask is no larger than its ranges
            mask, many = _ranges(seen)
        dtype = jnp.result_type(query, key, value)
        out = flash_attention(
            *(y.astype(dtype) for y in (query, key, value)),
            mask=mask,
            scale=_scale(self),
            softcap=self.attn_logits_soft_cap,
            implementation=implementation,
        )
        if many is not None:
            out = jnp.where(many[..., None, None], jnp.nan, out)
        output = self.attn_vec_einsum("BTNH,NHD->BTD", out.astype(jnp.result_type(key, value)))
        new = {"v": value, "k": key}
        if cache is not None:
            new |= {"end_index": cache["end_index"] + x.shape[1], "positions": positions}
        return (new if cache is not None or _shares(self) else None), output

    return __call__


def _shares(self: Any) -> bool:
    """Whether layers pass their keys on, as in Gemma 3n and 4."""
    return hasattr(self, "qk_norm_with_scale")


def _is_gemma_4(self: Any) -> bool:
    return hasattr(self, "k_eq_v")


def _scale(self: Any) -> float:
    return 1.0 if _is_gemma_4(self) else float(self.query_pre_attn_scalar)


def _projected(self: Any, x: Array, segment_pos: Array, shared: _Cache | None) -> tuple[Array, Array, Array]:
    """Query, key and value after norms and rotary embedding; `shared` keys are already embedded."""
    from gemma.gm.math import _positional_embeddings

    # In Flax a parameter exists only if it is used, so parameters that gemma itself does not need are used, too.
    made = shared is None or _is_gemma_4(self)
    key: Any = None
    value: Any = None
    if getattr(self, "use_qkv_einsum", False):
        query, key, value = self.qkv_einsum("BTD,SNDH->SBTNH", x)
    else:
        query = self.q_einsum("BTD,NDH->BTNH", x)
        if getattr(self, "k_eq_v", False):
            key = value = self.k_einsum("BSD,KDH->BSKH", x)
        elif made:
            key, value = self.kv_einsum("BSD,CKDH->CBSKH", x)

    def normed(array: Any, *names: str) -> Any:
        norm = next((found for name in names if (found := getattr(self, name, None)) is not None), None)
        return array if norm is None else norm(array)

    query = normed(query, "query_norm", "_query_norm")
    if made:
        key, value = normed(key, "key_norm", "_key_norm"), normed(value, "value_norm")
    rotary = dict(base_frequency=self.rope_base_frequency, scale_factor=self.rope_scale_factor)
    if _is_gemma_4(self):
        rotary["rope_proportion"] = self.rope_proportion
    query = _positional_embeddings.apply_rope(query, segment_pos, **rotary)
    if shared is not None:
        return query, shared["k"], shared["v"]
    return query, _positional_embeddings.apply_rope(key, segment_pos, **rotary), value


def _store(self: Any, cache: _Cache, tokens: int) -> Any:
    """A function that writes the new tokens of an array `[b, t, …]` into the cache, which is a ring."""
    end, size = cache["end_index"], cache["v"].shape[1]
    if _is_gemma_4(self):  # each row ends at its own position
        slots = (end[:, None] + jnp.arange(tokens)) % size
        rows = jnp.arange(end.shape[0])[:, None]
        return lambda name, new: cache[name].at[rows, slots].set(new)
    return lambda name, new: jax.lax.dynamic_update_slice_in_dim(cache[name], new, end[0] % size, axis=1)


def _ranges(seen: Array) -> tuple[Mask, Array]:
    """The two ranges of each row of `[b, t, keys]`, and `[b, t]`: whether the row has more."""
    keys = seen.shape[-1]
    j = jnp.arange(keys, dtype=jnp.int32)

    def first(where: Array, else_: Any) -> Array:
        return jnp.min(jnp.where(where, j, keys), -1, initial=keys).clip(max=else_)

    end = jnp.max(jnp.where(seen, j + 1, 0), -1, initial=0)
    start = first(seen, end)
    gap = first(~seen & (j > start[..., None]), end)
    second = first(seen & (j > gap[..., None]), end)
    many = jnp.sum(seen, -1) != (gap - start) + (end - second)
    pairs = [[x[:, None] for x in pair] for pair in ((start, gap), (second, end))]
    return masks.ranges(*pairs[0]) | masks.ranges(*pairs[1]), many


def _weights(self: Any, query: Array, key: Array, seen: Array) -> Array:
    """The attention weights `[b, t, heads, keys]` by plain JAX."""
    keys = jnp.repeat(key, query.shape[2] // key.shape[2], 2)
    logits = jnp.einsum("btnh,bsnh->btns", query * _scale(self), keys)
    if self.attn_logits_soft_cap is not None:
        logits = self.attn_logits_soft_cap * jnp.tanh(logits / self.attn_logits_soft_cap)
    weights: Array = jax.nn.softmax(jnp.where(seen[:, :, None], logits, _HIDDEN))
    return weights.astype(key.dtype)
