"""tokamax's `dot_product_attention`, and an implementation for it to call: `tokamax_attention`."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from .. import masks
from .._jax import constrained, parts_of
from ..attention import flash_attention
from ..batch_dims import check_batch_dims, local_window, over_batch_dims
from ..checker import INT32_MAX, Checker
from ..options import ArrayLike, Implementation, IndexLike, Number
from ..validate import IMPLEMENTATIONS
from . import costs

_SCORES = "batch... hq sq sk"
_LOWEST = float(np.finfo(np.float32).min)


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: Number | None = None,
    is_causal: bool = False,
    query_seq_lengths: IndexLike | None = None,
    key_value_seq_lengths: IndexLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: Number | None = None,
    precision: Any = None,
    implementation: Implementation | None = None,
    q_sharding: NamedSharding | None = None,
) -> Array:
    """Attention with the arguments of `tokamax.dot_product_attention`.

    Dimensions: *B any number of batch dims, T query length, S key length, N query heads, K KV heads, H and h head dims.

    Args:
      query, key, value: `[*B, T, N, H]`, `[*B, S, K, H]` and `[*B, S, K, h]`, float16, bfloat16 or float32.
      bias: added to the logits before the soft cap, broadcastable to `[*B, N, T, S]`. Differentiable.
      mask: boolean, broadcastable to `[*B, N, T, S]`; or a `Mask` or `CausalMask` of tokamax.
      scale: factor of q·kᵀ, 1/√H by default.
      is_causal: query i attends to keys 0 … i, whatever the lengths.
      query_seq_lengths, key_value_seq_lengths: int32, broadcastable to `[*B]`, the valid prefix of each row, past which
        nothing is read.
      local_window_size: `(left, right)`, or one int for both; query i attends to keys i − left … i + right.
      logits_soft_cap: c in `S ← c·tanh(S/c)`.
      precision: has no effect; products are accumulated in float32 and float32 is never rounded.
      implementation: as in `flash_attention`, not one of tokamax's names.
      q_sharding: a constraint on query's sharding; key and value are split over the same batch entries and heads. It is
        not needed where the arrays have shardings of their own.

    Returns:
      `[*B, T, N, h]` in query's dtype. Differentiable with respect to query, key, value and bias.

    Raises:
      NotImplementedError: for quantised arrays.
      ValueError, TypeError, NotImplementedError: as in `flash_attention`.

    One deviation from tokamax: a query without a visible key gives 0, not the mean of all values.

    Source: the interface is tokamax's; the algorithm is Dao, FlashAttention-2 (2023).

    Example:
      >>> out = dot_product_attention(q, k, v, is_causal=True, logits_soft_cap=50.0)
    """
    check = Checker("tokamax.dot_product_attention")
    if implementation not in (None, *IMPLEMENTATIONS):
        raise check.fail(
            f"implementation must be None or one of {IMPLEMENTATIONS}, got {implementation!r}; a model that passes one "
            "of tokamax's names runs here if it passes [tokamax_attention] to tokamax's own function instead"
        )
    call = _Call.of(check, query, key, value, q_sharding, None)
    call.see(mask, is_causal, None, None)
    for name, option, given in (
        ("query_seq_lengths", "q_lengths", query_seq_lengths),
        ("key_value_seq_lengths", "kv_lengths", key_value_seq_lengths),
    ):
        if given is not None:
            lengths = check.broadcastable(name, check.int32(name, given), call.batch, "batch...")
            call.arrays[option] = jnp.broadcast_to(lengths, call.batch)
    window = local_window(check, local_window_size)
    out, _ = call.attend(bias, scale, logits_soft_cap, window=window, implementation=implementation)
    return out


def tokamax_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    precision: Any = None,
    logits_dtype: Any = None,
    logits_scale: Any = None,
    bias: ArrayLike | None = None,
    logits_soft_cap: Number | None = None,
    mask: Any = None,
    is_causal: bool = False,
    dropout_mask: Any = None,
    dropout_rate: float = 0.0,
    paging_info: Any = None,
    q_sharding: NamedSharding | None = None,
    k_sharding: NamedSharding | None = None,
    q_indices: ArrayLike | None = None,
    k_indices: ArrayLike | None = None,
    normalize_output: bool = True,
    return_residuals: bool = False,
    implementation: Implementation | None = None,
) -> Array | tuple[Array, tuple[Array, Array]]:
    """The function that tokamax calls with `tokamax.dot_product_attention(…, implementation=[tokamax_attention])`.

    Args:
      q, k, v, bias, logits_soft_cap, is_causal, precision, q_sharding, implementation: as in `dot_product_attention`.
      logits_dtype: has no effect; scores are float32.
      logits_scale: a number; None or tokamax's AUTO is 1/√H.
      mask: a boolean array, tokamax's `CausalMask` or its `Mask`. Kernels skip what `causal_mask`, `k_start` and
        `k_end` hide, and `q_start` and `q_end` if they are the same for all keys. If these differ by key, they become
        a dense mask, with a warning.
      k_sharding: a constraint on k's and v's sharding.
      q_indices: positions of the queries for the mask, `[*#B, #N, T]`.
      k_indices: positions of the keys, `[*#B, #N, S]`, with which the mask becomes dense, with a warning.
      normalize_output: False only with return_residuals.
      return_residuals: also return `(maximum, sum)`, float32 `[*B, N, T]`, to combine partial results. Only
        sum·exp(maximum) matters for that; here they are (log Σ exp(S), 1), since the output is already normalised.

    Returns:
      `[*B, T, N, h]`, or the pair `(out, (maximum, sum))`.

    Raises:
      NotImplementedError: for quantised arrays, dropout_mask and paging_info, and for normalize_output=False alone, so
        that tokamax goes on to the next implementation where it was given several.
      ValueError, TypeError, NotImplementedError: as in `flash_attention`.

    Source: the interface is tokamax's.

    Example:
      >>> out = tokamax.dot_product_attention(q, k, v, is_causal=True, implementation=[tokamax_attention])
    """
    check = Checker("tokamax_attention")
    if dropout_mask is not None or check.number("dropout_rate", dropout_rate):
        raise check.fail(
            "dropout_mask is an array of all weights, which never exist here; "
            "jax_flash.flash_attention(…, dropout_rate=…, dropout_key=…) needs none",
            NotImplementedError,
        )
    if paging_info is not None:
        raise check.fail("paging_info is for jax_flash.paged_attention, with its tables", NotImplementedError)
    wanted = check.flag("return_residuals", return_residuals)
    if not (check.flag("normalize_output", normalize_output) or wanted):
        raise check.fail(
            "normalize_output is False without return_residuals, whose maximum and sum tell what it is not "
            "normalised by; pass return_residuals=True",
            NotImplementedError,
        )
    scale = None if isinstance(logits_scale, type) else logits_scale  # AUTO is a class
    call = _Call.of(check, q, k, v, q_sharding, k_sharding)
    call.see(mask, is_causal, q_indices, k_indices)
    out, lse = call.attend(bias, scale, logits_soft_cap, implementation=implementation)
    if not wanted:
        return out
    return out, (jnp.maximum(lse, _LOWEST), jnp.isfinite(lse).astype(jnp.float32))


@dataclass
class _Call:
    """The arrays of one call. Each batch dim of the mask's arrays has the call's size or 1."""

    check: Checker
    query: Array
    key: Array
    value: Array
    causal: bool = False
    arrays: dict[str, Array] = field(default_factory=dict)

    @classmethod
    def of(cls, check: Checker, query: Any, key: Any, value: Any, q_sharding: Any, k_sharding: Any) -> _Call:
        given = {"query": query, "key": key, "value": value}
        for name, x in given.items():
            if hasattr(x, "qvalue"):
                raise check.fail(
                    f"{name} is quantised ({type(x).__name__}); pass qwix.dequantize({name})",
                    NotImplementedError,
                )
        q, k, v = (check.array(name, x) for name, x in given.items())
        check_batch_dims(check, q, k, v)
        if q_sharding is not None:
            spec = (*q_sharding.spec, *(None,) * (q.ndim - len(q_sharding.spec)))
            heads = None if k.shape[-2] % parts_of(q_sharding, spec[-2]) else spec[-2]
            of_keys = NamedSharding(q_sharding.mesh, PartitionSpec(*spec[:-3], None, heads, None))
            k_sharding = of_keys if k_sharding is None else k_sharding
            q = constrained(q, q_sharding)
        if k_sharding is not None:
            k, v = (constrained(x, k_sharding) for x in (k, v))
        return cls(check, q, k, v)

    @property
    def batch(self) -> tuple[Any, ...]:
        return self.query.shape[:-3]

    @property
    def scores(self) -> tuple[Any, ...]:
        return (*self.batch, self.query.shape[-2], self.query.shape[-3], self.key.shape[-3])

    def see(self, mask: Any, is_causal: bool, q_indices: Any, k_indices: Any) -> None:
        """Sets which keys the rows see: by this library's causal option, ranges of keys, and a dense array."""
        parts = _Parts.of(self.check, mask)
        causal = self.check.flag("is_causal", is_causal) or parts.is_causal
        self.causal = causal and q_indices is None and k_indices is None
        rows, keys = (
            jnp.arange(n, dtype=jnp.int32) if x is None else _int32(self.check, name, x)
            for n, name, x in zip(self.scores[-2:], ("q_indices", "k_indices"), (q_indices, k_indices))
        )
        lows: list[Array] = []
        highs: list[Array] = []
        dense: list[Array] = []
        for bound, limits, sign in ((parts.k_start, lows, 1), (parts.k_end, highs, -1)):
            if bound is not None and k_indices is None:
                limits.append(bound)
            elif bound is not None:
                dense.append(_at_least(sign, keys[..., None, :], bound[..., :, None]))
        if parts.band is not None:
            end = rows + jnp.asarray(parts.band.offset, jnp.int32) + 1
            edges = [(end, highs, -1)]
            if parts.band.window_size is not None:
                size = _int32(self.check, "mask's window_size", parts.band.window_size)
                edges.append((end - size, lows, 1))
            for edge, limits, sign in edges:
                if k_indices is None:
                    limits.append(edge)
                else:
                    dense.append(_at_least(sign, keys[..., None, :], edge[..., :, None]))
        if causal and not self.causal:
            if k_indices is None:
                highs.append(rows + 1)
            else:
                dense.append(keys[..., None, :] <= rows[..., :, None])
        for bound, sign in ((parts.q_start, 1), (parts.q_end, -1)):
            if bound is not None and bound.shape[-1] == 1:  # the bound is the same for all keys
                highs.append(jnp.where(_at_least(sign, rows, bound), INT32_MAX, 0))
            elif bound is not None:
                dense.append(_at_least(sign, rows[..., :, None], bound[..., None, :]))
        if lows or highs:
            self._add("lo", reduce(jnp.maximum, lows, jnp.zeros(1, jnp.int32)), self.scores[:-1])
            self._add("hi", reduce(jnp.minimum, highs, jnp.full(1, INT32_MAX, jnp.int32)), self.scores[:-1])
        if dense:
            shape = jnp.broadcast_shapes(*(x.shape for x in dense))
            why = "k_indices are given" if k_indices is not None else "q_start or q_end differs by key"
            costs.warn_dense(
                self.check,
                "mask",
                why,
                shape,
                "k_start and k_end, a range of keys to each query, cost nothing",
            )
        if parts.bool_mask is not None:
            dense.append(parts.bool_mask)
        if dense:
            self._add("dense", reduce(jnp.logical_and, dense), self.scores)

    def _add(self, name: str, x: Array, wanted: tuple[Any, ...]) -> None:
        dims = _SCORES if len(wanted) == len(self.scores) else _SCORES.removesuffix(" sk")
        self.arrays[name] = self.check.broadcastable("mask", x, wanted, dims)

    def attend(self, bias: Any, scale: Any, softcap: Any, **options: Any) -> tuple[Array, Array]:
        """Out `[*B, T, N, h]` and lse `[*B, N, T]`."""
        if bias is not None:
            x = self.check.bias("bias", bias, self.query.dtype)
            self.arrays["bias"] = self.check.broadcastable("bias", x, self.scores, _SCORES)
        run = partial(
            flash_attention,
            causal=self.causal,
            align="top_left",
            scale=scale,
            softcap=softcap,
            bias_first=True,
            return_lse=True,
            **options,
        )

        def of_batch(q: Array, k: Array, v: Array, **arrays: Any) -> Any:
            conditions = []
            if "lo" in arrays:
                conditions.append(masks.ranges(arrays.pop("lo"), arrays.pop("hi")))
            if "dense" in arrays:
                conditions.append(masks.dense(arrays.pop("dense")))
            mask = reduce(masks.Mask.__and__, conditions) if conditions else None
            return run(q, k, v, mask=mask, **arrays)

        out, lse = over_batch_dims(of_batch, self.query, self.key, self.value, self.arrays)
        return out, lse


@dataclass
class _Parts:
    """The fields of tokamax's Mask: arrays […, N, T] per query, […, N, S] per key, a boolean one, and its CausalMask
    if it has an offset or a window."""

    bool_mask: Array | None = None
    q_start: Array | None = None
    q_end: Array | None = None
    k_start: Array | None = None
    k_end: Array | None = None
    is_causal: bool = False
    band: Any = None

    @classmethod
    def of(cls, check: Checker, mask: Any) -> _Parts:
        if mask is None:
            return cls()
        if hasattr(mask, "window_size"):
            plain = isinstance(mask.offset, int) and mask.offset == 0 and mask.window_size is None
            return cls(is_causal=plain, band=None if plain else mask)
        if not hasattr(mask, "bool_mask"):
            return cls(_booleans(check, "mask", mask))
        found = {name: getattr(mask, name) for name in ("q_start", "q_end", "k_start", "k_end")}
        bounds = {name: _int32(check, f"mask's {name}", x) for name, x in found.items() if x is not None}
        seen = None if mask.bool_mask is None else _booleans(check, "mask's bool_mask", mask.bool_mask)
        band = None if mask.is_causal else getattr(mask, "causal_mask", None)
        return cls(seen, is_causal=mask.is_causal, band=band, **bounds)


def _booleans(check: Checker, name: str, x: Any) -> Array:
    if isinstance(x, masks.Mask):
        raise check.fail(f"{name} must be an array, got {x!r}; jax_flash.flash_attention takes it", TypeError)
    array = check.array(name, x)
    check.dtype(name, array, ("bool",), "; pass an additive mask as bias, or .astype(bool)")
    return array


def _int32(check: Checker, name: str, x: Any) -> Array:
    """Converts integers to int32. Indices that int32 cannot hold are clipped to values outside all keys."""
    x = check.array(name, x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise check.fail(
            f"{name} must hold integers, got {x.dtype}; cast it with .astype('int32')", TypeError
        )
    held = np.iinfo(x.dtype)
    return jnp.clip(x, max(held.min, -INT32_MAX), min(held.max, INT32_MAX)).astype(jnp.int32)


def _at_least(sign: int, x: Array, bound: Array) -> Array:
    """x ≥ bound; x < bound if the sign is −1."""
    return x >= bound if sign > 0 else x < bound
