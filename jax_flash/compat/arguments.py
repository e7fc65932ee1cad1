"""Checks and conversions that adapters share, most of them of flash_attn's arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._jax import is_symbolic
from ..checker import MARK_STATIC, Checker, is_int
from ..options import ArrayLike
from ..validate import require_dropout_key


@dataclass(frozen=True)
class Cache:
    """Any of flash_attn's caches as page pools; with left padding, each sequence begins at its `start`."""

    k_pages: jax.Array
    v_pages: jax.Array
    tables: jax.Array
    start: jax.Array | None  # [b]; None without left padding

    @classmethod
    def of(
        cls,
        check: Checker,
        b: Any,
        k_cache: Any,
        v_cache: Any,
        batch_idx: Any,
        leftpad: Any,
        block_table: Any,
    ) -> Cache:
        dims = "b_cache s_max hk {}" if block_table is None else "p ps hk {}"
        k = ranked(check, "k_cache", k_cache, dims.format("d"))
        v = ranked(check, "v_cache", v_cache, dims.format("dv"))
        if block_table is not None:
            for name, x in (("cache_batch_idx", batch_idx), ("cache_leftpad", leftpad)):
                if x is not None:
                    raise check.fail(
                        f"{name} must be None with a block_table, which already says where keys lie"
                    )
            return cls(k, v, ranked(check, "block_table", block_table, "b pages"), None)
        rows = _row_of_cache(check, b, k.shape[0], batch_idx)
        if leftpad is None:
            return cls(k, v, rows[:, None], None)
        start = check.int32("cache_leftpad", leftpad)
        check.shape("cache_leftpad", start, (b,), "b")
        return cls(k, v, rows[:, None], jnp.clip(start, 0, k.shape[1]))

    @property
    def capacity(self) -> Any:
        return self.tables.shape[1] * self.k_pages.shape[1]

    def ends(self, check: Checker, b: Any, cache_seqlens: Any) -> jax.Array:
        """The end of each sequence before the call, int32 `[b]`."""
        if cache_seqlens is None:
            return jnp.full((b,), self.capacity, jnp.int32)
        return check.lengths("cache_seqlens", cache_seqlens, b, "b")

    def lengths(self, ends: jax.Array) -> jax.Array:
        """The numbers of keys of sequences with these ends; the ends are clamped to the cache."""
        return ends if self.start is None else jnp.clip(ends, 0, self.capacity) - self.start

    def without_padding(self) -> Cache:
        """The same keys, to be read only, with every sequence at the start of its row of the table."""
        if self.start is None:
            return self
        rows, s_max = self.k_pages.shape[:2]
        token = jnp.arange(s_max, dtype=jnp.int32)[None]
        slot = self.start[:, None] + token  # with pages of one key, a sequence may begin at any slot
        # Slots past the end of a cache row are never read, because they lie past its sequence's length.
        inside = (self.tables >= 0) & (self.tables < rows)
        tables = jnp.where(inside, self.tables * jnp.int32(s_max) + slot, jnp.int32(-1))
        k, v = (x.reshape(rows * s_max, 1, *x.shape[2:]) for x in (self.k_pages, self.v_pages))
        return Cache(k, v, tables, None)


def _row_of_cache(check: Checker, b: Any, b_cache: Any, batch_idx: Any) -> jax.Array:
    if batch_idx is None:
        if not (is_symbolic(b) or is_symbolic(b_cache)) and b_cache < b:
            raise check.fail(
                f"k_cache has {b_cache} rows, fewer than q's batch of {b}; name rows by cache_batch_idx"
            )
        return jnp.arange(b, dtype=jnp.int32)
    rows = check.int32("cache_batch_idx", batch_idx)
    check.shape("cache_batch_idx", rows, (b,), "b")
    return rows


def check_new(check: Checker, k: Any, v: Any, cos: Any, sin: Any, cache_seqlens: Any) -> None:
    """Checks that arguments about new keys come together with those that they need."""
    for (one, x), (other, y) in ((("k", k), ("v", v)), (("rotary_cos", cos), ("rotary_sin", sin))):
        if (x is None) != (y is None):
            given, missing = (one, other) if y is None else (other, one)
            raise check.fail(f"{given} was given without {missing}; pass both or neither")
    if cos is not None and k is None:
        raise check.fail("rotary_cos needs k and v; to rotate q alone, use jax_flash.apply_rotary")
    if k is not None and cache_seqlens is None:
        raise check.fail("cache_seqlens is None with k and v; it says where they are appended")


def rotary_tables(check: Checker, cos: Any, sin: Any, capacity: Any) -> tuple[jax.Array, jax.Array] | None:
    """(cos, sin) in float32; flash_attn passes them in q's dtype."""
    if cos is None:
        return None
    cos, sin = (
        ranked(check, n, x, "positions d_rot/2") for n, x in (("rotary_cos", cos), ("rotary_sin", sin))
    )
    positions = cos.shape[0]
    if not (is_symbolic(positions) or is_symbolic(capacity)) and positions < capacity:
        raise check.fail(
            f"rotary_cos has {positions} positions, fewer than the {capacity} keys a sequence may have"
        )
    return cos.astype(jnp.float32), sin.astype(jnp.float32)


def ranked(check: Checker, name: str, x: Any, dims: str) -> jax.Array:
    array = check.array(name, x)
    check.rank(name, array, dims)
    return array


def known_fields(check: Checker, mask: Any, known: Sequence[str], instead: str) -> None:
    """Raises if a field that another version of a library's mask class has hides or shows keys."""
    other = [name for name, x in vars(mask).items() if name not in known and x is not None and x is not False]
    if other:
        raise check.fail(
            f"mask has {', '.join(sorted(other))}, which this version of jax_flash does not know, only "
            f"{', '.join(known)}; {instead}",
            NotImplementedError,
        )


class SegmentIds(NamedTuple):
    """Segments of queries and keys, int32; a query sees keys of its own segment alone."""

    q: ArrayLike
    kv: ArrayLike


def segment_ids(check: Checker, ids: Any) -> tuple[Any, Any]:
    """Those of queries and of keys in `SegmentIds`, also of JAX's classes."""
    if not (hasattr(ids, "q") and hasattr(ids, "kv")):
        raise check.fail(
            f"segment_ids must be SegmentIds(q, kv), got {type(ids).__name__}; SegmentIds(*pair) makes it of two",
            TypeError,
        )
    return ids.q, ids.kv


def window(check: Checker, size: Any) -> tuple[int | None, int | None] | None:
    """The window with None for unlimited, which is −1 in flash_attn."""
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise check.fail(f"window_size must be a pair (left, right), got {size!r}", TypeError)
    for x in size:
        if not is_int(x):
            raise check.fail(f"window_size must hold two ints, −1 for unlimited, got {size!r}", TypeError)
    left, right = (None if x < 0 else int(x) for x in size)
    return None if left is None and right is None else (left, right)


def softcap(check: Checker, softcap: Any) -> float | None:
    """The softcap with None for none, which is any number up to 0.0 in flash_attn."""
    cap = check.number("softcap", softcap)
    return None if cap <= 0 else cap


def dropout(check: Checker, dropout_p: Any, dropout_key: ArrayLike | None) -> dict[str, Any]:
    """The two as options of flash_attention."""
    if check.number("dropout_p", dropout_p, MARK_STATIC) > 0:
        require_dropout_key(check, "dropout_p", dropout_p, dropout_key)
    return dict(dropout_rate=dropout_p, dropout_key=dropout_key)


def refuse_weights(check: Checker, wanted: bool, dropout_p: float, function: str) -> None:
    """Raises if return_attn_probs is combined with dropout, since flash_attn would then return attention weights."""
    if check.flag("return_attn_probs", wanted) and check.number("dropout_p", dropout_p, MARK_STATIC):
        raise check.fail(
            f"return_attn_probs with dropout_p {dropout_p} asks for the attention weights, which never exist as an "
            f"array; for softmax_lse, use jax_flash.{function}(…, return_lse=True)",
            NotImplementedError,
        )
