"""Levanter's `dot_product_attention`, over the named axes of Haliax."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .. import masks
from .._jax import with_dims_merged
from ..attention import flash_attention
from ..batch_dims import over_batch_dims
from ..checker import MARK_STATIC, Checker
from ..options import Implementation
from ..validate import dropout_key
from . import arguments
from .levanter_grug import grug_attention

_FIELDS = (
    "bidirectional_window",
    "causal_offset",
    "explicit_mask",
    "is_causal",
    "segment_ids",
    "sliding_window",
)
NamedArray = Any  # haliax's class; haliax is imported only when one is made
Axis = Any


def patch() -> None:
    """Puts `dot_product_attention` and `grug_attention` in the place of Levanter's own, also in modules that have taken
    the names from `levanter.layers.attention` and `levanter.grug.attention` (some models, which importing levanter may
    load)."""
    _replace("levanter.layers.attention", "dot_product_attention", dot_product_attention)
    with suppress(ModuleNotFoundError):  # versions without grug
        _replace("levanter.grug.attention", "attention", grug_attention)


def _replace(module: str, name: str, ours: Callable[..., Any]) -> None:
    own = getattr(import_module(module), name)
    for loaded, x in list(sys.modules.items()):
        if loaded.startswith("levanter") and getattr(x, name, None) is own:
            setattr(x, name, ours)


def dot_product_attention(
    QPos: Any,
    KPos: Any,
    Key: Any,
    query: NamedArray,
    key: NamedArray,
    value: NamedArray,
    mask: Any = None,
    bias: NamedArray | None = None,
    attention_dtype: Any = None,
    precision: Any = None,
    use_flash: bool | None = None,
    attn_backend: Any = None,
    flash_block_size: int | None = None,
    dropout: float = 0.0,
    *,
    logits_soft_cap: float | None = None,
    scaling_factor: Any = None,
    inference: bool = True,
    prng: Array | None = None,
    attn_sink: NamedArray | None = None,
    implementation: Implementation | None = None,
) -> NamedArray:
    """`flash_attention` with the arguments of `levanter.layers.attention.dot_product_attention`.

    Axes that query, key and value share are batch dims and KV heads. Axes that only query has count its heads per KV
    head.

    Args:
      QPos, KPos, Key: axes of the queries' positions, the keys' positions and the head dim, or their names. QPos and
        KPos must have different names.
      query, key, value: NamedArrays with at least {QPos, Key}, {KPos, Key} and {KPos, a head dim}. Their dtypes are
        promoted to one, which must be float16, bfloat16 or float32.
      mask: an `AttentionMask`, or a boolean NamedArray of some of the axes. Kernels skip keys that the offset, segments
        or window of an `AttentionMask` hide.
      bias: a NamedArray of some of the axes, added before the soft cap. Differentiable.
      dropout, inference, prng: dropout of the attention weights unless `inference`, with other random bits than
        Levanter's.
      logits_soft_cap: c in `S ← c·tanh(S/c)`.
      scaling_factor: factor of q·kᵀ, 1/√(size of Key) by default; it may be traced.
      attn_sink: a NamedArray of some of query's axes but Key, logits that take part in the softmax sum only. A soft cap
        does not cap them, as in Levanter's flash attention (its "vanilla" one does). Differentiable.
      attention_dtype, precision: have no effect; scores and softmax are float32, and float32 products are not rounded.
      use_flash, attn_backend, flash_block_size: have no effect.
      implementation: as in `flash_attention`.

    Returns:
      A NamedArray of query's axes in their order without Key, and value's head dim last.

    Raises:
      ValueError: where QPos and KPos have one name, and for axes of key or value that query lacks.
      NotImplementedError: for an offset or segment ids that differ by head, and for fields of an `AttentionMask` that
        this version does not know.
      ValueError, TypeError, NotImplementedError: as in `flash_attention`.

    One deviation: a query without a visible key gives 0, not the mean of all values.

    Source: the interface is Levanter's; the algorithm is Dao, FlashAttention-2 (2023).

    Example:
      >>> jax_flash.compat.levanter.patch()  # Levanter's layers and models run here
    """
    import haliax

    check = Checker("levanter.dot_product_attention")
    axes = _Axes.of(check, query, key, value, QPos, KPos, Key)
    dtype = jnp.result_type(*(x.dtype for x in (query, key, value)))
    q, k, v = (
        _arranged(x, order).astype(dtype)
        for x, order in ((query, axes.of_query), (key, axes.of_key), (value, axes.of_value))
    )
    lead = len(axes.batch) + 1
    q, k, v = (with_dims_merged(x, lead, x.ndim - lead - 1) for x in (q, k, v))
    scale = scaling_factor
    if isinstance(scale, jax.core.Tracer):
        q, scale = q * scale.astype(dtype), 1.0
    seen = _Seen.of(check, axes, mask)
    arrays = seen.arrays
    if bias is not None:
        arrays["bias"] = check.bias("bias", axes.scores(check, "bias", bias), dtype)
    shared: dict[str, Array] = {}
    if attn_sink is not None:
        sinks = axes.sinks(check, attn_sink)
        (shared if sinks.ndim == 1 else arrays)["sinks"] = sinks
    dropping = check.number("dropout", dropout, MARK_STATIC) > 0.0 and not inference
    if dropping:
        if prng is None:
            raise check.fail(f"dropout is {dropout} without inference, which needs prng")
        arrays["dropout_key"] = dropout_key(check, "prng", prng)
    run = partial(
        flash_attention,
        causal=seen.causal,
        window=seen.window,
        align="top_left",
        scale=scale,
        softcap=logits_soft_cap,
        bias_first=True,
        dropout_rate=dropout if dropping else 0.0,
        implementation=implementation,
        **shared,
    )

    def of_batch(q: Array, k: Array, v: Array, **arrays: Any) -> Any:
        conditions = []
        if "offset" in arrays:
            conditions.append(masks.causal(arrays.pop("offset")))
        if "dense" in arrays:
            conditions.append(masks.dense(arrays.pop("dense")))
        ids = (arrays.pop("q_ids"), arrays.pop("kv_ids")) if "q_ids" in arrays else None
        found = (
            None
            if not conditions
            else conditions[0]
            if len(conditions) == 1
            else conditions[0] & conditions[1]
        )
        return run(q, k, v, mask=found, segment_ids=ids, **arrays)

    out = over_batch_dims(of_batch, q, k, v, arrays)
    out = out.reshape(*(axis.size for axis in axes.of_query[:-1]), out.shape[-1])
    named = haliax.named(out, (*axes.of_query[:-1], axes.of_value[-1]))
    return haliax.auto_sharded(
        named.rearrange((*(x for x in query.axes if x.name != axes.key.name), axes.of_value[-1]))
    )


@dataclass(frozen=True)
class _Axes:
    """The axes of one call, by their purpose: batch dims, positions, KV head, query heads of a KV head, head dims."""

    batch: tuple[Axis, ...]
    q_pos: Axis
    k_pos: Axis
    kv_head: tuple[Axis, ...]  # one axis, or none
    group: tuple[Axis, ...]
    key: Axis
    value: Axis

    @classmethod
    def of(cls, check: Checker, query: Any, key: Any, value: Any, QPos: Any, KPos: Any, Key: Any) -> _Axes:
        q_pos, k_pos, dim = query.resolve_axis(QPos), key.resolve_axis(KPos), query.resolve_axis(Key)
        if q_pos.name == k_pos.name:
            raise check.fail(f"QPos and KPos must have different names, got {q_pos.name!r} for both")
        names = [{axis.name for axis in x.axes} for x in (key, value)]
        rest = [axis for axis in query.axes if axis.name not in (q_pos.name, dim.name)]
        shared = [axis for axis in rest if axis.name in names[0] and axis.name in names[1]]
        group = [axis for axis in rest if axis.name not in names[0] | names[1]]
        known = {axis.name for axis in (*shared, k_pos)}
        values = [axis for axis in value.axes if axis.name not in known]
        odd = names[0] - known - {dim.name} | {axis.name for axis in values[:-1]}
        if odd or len(values) != 1 or dim.name not in names[0]:
            raise check.fail(
                f"key {_text(key)} must have {_text(known | {dim.name})}, and value {_text(value)} these and a head "
                f"dim, beside query {_text(query)}"
            )
        # Levanter's rule: the last shared axis counts heads, unless query begins with it.
        at_front = bool(shared) and not group and query.axes[0] == shared[-1]
        cut = len(shared) if at_front else max(len(shared) - 1, 0)
        return cls(tuple(shared[:cut]), q_pos, k_pos, tuple(shared[cut:]), tuple(group), dim, values[0])

    @property
    def of_query(self) -> tuple[Axis, ...]:
        return (*self.batch, self.q_pos, *self.kv_head, *self.group, self.key)

    @property
    def of_key(self) -> tuple[Axis, ...]:
        return (*self.batch, self.k_pos, *self.kv_head, self.key)

    @property
    def of_value(self) -> tuple[Axis, ...]:
        return (*self.batch, self.k_pos, *self.kv_head, self.value)

    @property
    def head_sizes(self) -> tuple[int, ...]:
        return tuple(axis.size for axis in (*self.kv_head, *self.group))

    @property
    def heads(self) -> int:
        return math.prod(self.head_sizes)

    def scores(self, check: Checker, name: str, x: Any) -> Array:
        """x as `[batch | 1…, heads | 1, QPos | 1, KPos | 1]`."""
        heads = (*self.kv_head, *self.group)
        order = (*self.batch, *heads, self.q_pos, self.k_pos)
        self.only(check, name, x, order)
        array = _arranged(x, order)
        if math.prod(array.shape[len(self.batch) : -2]) not in (
            1,
            self.heads,
        ):  # it differs along some axes of heads only
            array = jnp.broadcast_to(
                array, (*array.shape[: len(self.batch)], *self.head_sizes, *array.shape[-2:])
            )
        return with_dims_merged(array, len(self.batch), len(heads))

    def entries(self, check: Checker, name: str, x: Any, pos: Axis | None = None) -> Array:
        """x as `[batch…]`, or `[batch…, pos]` if `pos` is given."""
        order = self.batch if pos is None else (*self.batch, pos)
        self.only(check, name, x, order)
        array = _arranged(x, order)
        return jnp.broadcast_to(array, tuple(axis.size for axis in order)).astype(jnp.int32)

    def sinks(self, check: Checker, x: Any) -> Array:
        """x as float32 `[heads]`, or `[batch…, QPos, heads]` where it differs by more than heads."""
        heads = (*self.kv_head, *self.group)
        order = (*self.batch, self.q_pos, *heads)
        self.only(check, "attn_sink", x, order)
        if all(axis in heads for axis in x.axes):
            order = heads
        array = jnp.broadcast_to(_arranged(x, order), tuple(axis.size for axis in order)).astype(jnp.float32)
        return with_dims_merged(array, len(order) - len(heads), len(heads))

    def only(self, check: Checker, name: str, x: Any, allowed: tuple[Axis, ...]) -> None:
        names = {axis.name for axis in allowed}
        other = [axis.name for axis in x.axes if axis.name not in names]
        if other:
            raise check.fail(
                f"{name} {_text(x)} differs along {', '.join(other)}; allowed are {_text(names)}",
                NotImplementedError,
            )


@dataclass
class _Seen:
    """The keys that rows see: causal and window as options, and arrays with all batch dims."""

    causal: bool = False
    window: tuple[int, int] | None = None
    arrays: dict[str, Array] = field(default_factory=dict)

    @classmethod
    def of(cls, check: Checker, axes: _Axes, mask: Any) -> _Seen:
        found = cls()
        if mask is None:
            return found
        if not hasattr(mask, "is_causal"):
            found.arrays["dense"] = axes.scores(check, "mask", mask).astype(bool)
            return found
        instead = "mask.materialize(QPos, KPos) is an array with all of them"
        arguments.known_fields(check, mask, _FIELDS, instead)
        offset = getattr(mask, "causal_offset", None)
        found.causal = mask.is_causal and offset is None
        if mask.is_causal and offset is not None:
            found.arrays["offset"] = axes.entries(check, "mask's causal_offset", offset)
        window = getattr(mask, "sliding_window", None)
        if window is not None:
            found.window = (window - 1, 0)  # the query's own key, and the keys before it
        radius = getattr(mask, "bidirectional_window", None)
        if radius is not None:
            left, right = found.window or (radius, radius)
            found.window = (min(left, radius), min(right, radius))
        if mask.explicit_mask is not None:
            found.arrays["dense"] = axes.scores(check, "mask's explicit_mask", mask.explicit_mask).astype(
                bool
            )
        ids = mask.segment_ids
        if ids is not None:
            pair = ids if isinstance(ids, tuple) else (ids, ids)
            for name, x, pos in zip(("q_ids", "kv_ids"), pair, (axes.q_pos, axes.k_pos)):
                either = [axis.name for axis in x.axes if axis.name in (axes.q_pos.name, axes.k_pos.name)]
                x = x.rename({either[0]: pos.name}) if either else x
                found.arrays[name] = axes.entries(check, "mask's segment_ids", x, pos)
        return found


def _arranged(x: Any, order: tuple[Axis, ...]) -> Array:
    """x's array with these axes, of size 1 where x lacks one."""
    have = {axis.name: axis for axis in x.axes}
    array: Array = x.rearrange(tuple(have[axis.name] for axis in order if axis.name in have)).array
    return array.reshape(tuple(have[axis.name].size if axis.name in have else 1 for axis in order))


def _text(x: Any) -> str:
    names = [axis.name for axis in x.axes] if hasattr(x, "axes") else sorted(x)
    return f"{{{', '.join(names)}}}"
