"""`check_inputs`: checks the values of a call's index arrays on the host."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from .checker import Checker, function_text, is_function
from .masks import Mask
from .operands import APPEND, APPEND_OPTIONAL, DIMS, ELEMENTS, FORWARD, OPTIONAL, WINDOW
from .rotary import rotary_pair
from .visible.check import MaskChecker

_CHECK = Checker("check_inputs")

# Operands that the functions make of other arguments.
_OTHERWISE_NAMED = (
    "q_segment_ids", "kv_segment_ids", "position", "dropout", "tbias", "ranges", "block_mask", *WINDOW,
)  # fmt: skip
_DIMS = {name: dims for table in DIMS.values() for name, dims in table.items()}
_INT32 = [name for name in _DIMS if ELEMENTS[name] == "int32" and name not in _OTHERWISE_NAMED]
_OFFSETS = tuple(name for name in _INT32 if _DIMS[name] == ("n1",))
_OF_JAX_NN = ("query_seq_lengths", "key_value_seq_lengths")
_LENGTHS = (*(name for name in _INT32 if _DIMS[name] in (("b",), ("n",))), *_OF_JAX_NN)
# The index arrays and their ranks; _check_* below hold the bounds that depend on other operands.
_RANKS = {name: len(_DIMS[name]) for name in _INT32} | dict.fromkeys(_OF_JAX_NN, 1)
_SCALES = ("k_scale", "v_scale")
_LEAST_RANKS = dict.fromkeys(("query", "key", "value"), 3) | dict.fromkeys(("k_pages", "v_pages"), 4)
_INDEX = (*_RANKS, "segment_ids", "positions")
_OPERANDS = {*FORWARD.operands, *OPTIONAL, *APPEND.operands, *APPEND_OPTIONAL} - {*_OTHERWISE_NAMED}
_OPERANDS |= {"dropout_key", "rotary", "x"}


def check_inputs(*, page_layout: str = "nhd", **arrays: Any) -> None:
    """Checks the values of a call's index arrays, which the call itself sees only on the device.

    The call never reads or writes out of bounds, but it silently replaces wrong values: lengths are clamped,
    offsets are read as their running maximum, and a page outside the pool gives NaN. `check_inputs` raises
    instead. Pass arrays under the names that the public functions give them; every rule whose arrays are
    present is checked.

    Args:
      cu_seqlens_q, cu_seqlens_k, cu_seqlens: int32 `[n + 1]`. They must start at 0, not decrease, and not exceed
        the tokens of `query` (cu_seqlens_q) or `key`.
      q_lengths, kv_lengths (`query_seq_lengths`, `key_value_seq_lengths`): int32 `[b]` or `[n]`, or one number for
        all, at least 0. They must not exceed the length of `query` or `key`; for varlen the keys of each sequence; for
        paged calls the capacity of a row of `block_tables`, minus the tokens of `key` for append_kv (`key` with
        `k_pages`).
      mask: a value of `jax_flash.masks`. Ranges must lie within the keys, blocks of keys exist and be chosen once,
        positions of keys not decrease, and the keys of a segment be neighbours in packed and paged calls.
      segment_ids: int32 `(q_ids [b, sq], kv_ids [b, sk])`, or one array when sq = sk. Any value is valid.
      block_tables: int32 `[n, pages]`. Entries that hold keys must be pages of `k_pages`, and no two sequences may
        append to the same slot.
      positions: int32, within the rows of `cos`.
      k_scale, v_scale: `[hk]`, `[p, hk]` or a number, of the pools; those of the pages in use must be finite and
        above 0.
      query, key, value, k_pages, v_pages, rotary, cos, …: the other operands, of which only the shapes are used.
      page_layout: `"nhd"` (`k_pages [p, ps, hk, d]`) or `"hnd"` (`[p, hk, ps, d]`).

    Arguments that are None count as absent. Arrays of a vmapped call must be checked one entry at a time.

    Raises:
      ValueError: for a wrong value, with its index, and for index arrays whose number of sequences or shape contradicts
        the other operands. The shapes of these are checked by the call itself while it is traced, a mask's too.
      TypeError: for an unknown name, a function in place of an array, a rotary that is no pair, and an index array that
        is traced or that the functions refuse for its dtype.

    Example:
      >>> check_inputs(query=q, cu_seqlens_q=jnp.array([0, 20, 17], jnp.int32))
      ValueError: check_inputs: cu_seqlens_q[2] = 17 is less than cu_seqlens_q[1] = 20; offsets must not …
    """
    _CHECK.page_layout(page_layout)
    call = _Call(hnd=page_layout == "hnd")
    for name, x in arrays.items():
        call.add(name, x)
    call.spread_numbers()
    for name in _OFFSETS:
        if name in call.index:
            _check_offsets(call, name)
    _check_sequence_counts(call)
    for name in _LENGTHS:
        if name in call.index:
            _check_lengths(call, name)
    _check_segments(call)
    if call.mask is not None:
        _mask_checker(call).run(call.mask)
    if "block_tables" in call.index and "kv_lengths" in call.index:
        _check_pages(call)
    for name in _SCALES:
        if name in call.shapes:
            _check_scale(call, name)
    if "positions" in call.index and "cos" in call.shapes:
        _check_below(call, "positions", call.shapes["cos"][0], "cos")


@dataclass
class _Call:
    """The index arrays, as int64 so that sums cannot overflow, the scales, and the shapes of all other operands."""

    hnd: bool
    index: dict[str, np.ndarray] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    scales: dict[str, np.ndarray] = field(default_factory=dict)  # scales whose values are known
    mask: Mask | None = None

    def add(self, name: str, x: Any) -> None:
        if name not in _INDEX and name not in _OPERANDS:
            raise _CHECK.fail(
                f"{name!r} is no operand of this library; the index arrays are {', '.join(_INDEX)}", TypeError
            )
        if x is None:
            return
        if is_function(x):
            raise _CHECK.fail(f"{name} must be an array, got {function_text(x)}", TypeError)
        if isinstance(x, Mask):
            self.mask = x
        elif name == "segment_ids":
            for side, part in zip(("q", "kv"), _CHECK.segment_pair(x)):
                self.index[f"{side}_segment_ids"] = _host("segment_ids", part)
        elif name in _INDEX:
            self.index[name] = _host(name, x)
            one_for_all = name in _LENGTHS and self.index[name].ndim == 0
            if self.index[name].ndim != _RANKS.get(name, self.index[name].ndim) and not one_for_all:
                raise _CHECK.fail(
                    f"{name} must have rank {_RANKS[name]}, got shape {self.index[name].shape}; "
                    "check the rows of a vmapped call one at a time"
                )
        else:
            self.shapes[name] = shape = np.shape(rotary_pair(_CHECK, x)[0] if name == "rotary" else x)
            if len(shape) < (least := _LEAST_RANKS.get(name, 0)):
                raise _CHECK.fail(f"{name} must have at least {least} dimensions, got shape {shape}")
            if name in _SCALES and not isinstance(x, (jax.core.Tracer, jax.ShapeDtypeStruct)):
                self.scales[name] = np.asarray(_CHECK.array(name, _local(name, x)))

    def sequence_counts(self) -> dict[str, int]:
        """The number of sequences or batch entries, according to each array that has one entry for each."""
        counts = {name: self.index[name].size - 1 for name in _OFFSETS if name in self.index}
        for name in (*_LENGTHS, "block_tables"):
            if name in self.index and self.index[name].ndim:
                counts[name] = len(self.index[name])
        query = self.shapes.get("query", ())
        if not counts.keys() & set(_OFFSETS) and len(query) in (3, 4):
            counts["query"] = query[0] if len(query) == 4 else 1
        return counts

    def spread_numbers(self) -> None:
        """Replaces a number that is the length of all sequences by an array."""
        count = next(iter(self.sequence_counts().values()), 1)
        for name in _LENGTHS:
            if name in self.index and not self.index[name].ndim:
                self.index[name] = np.full(count, self.index[name])

    def length(self, *names: str) -> int | None:
        """The number of tokens of the first of these operands that was passed."""
        return next((self.shapes[n][-3] for n in names if n in self.shapes), None)

    @property
    def page_size(self) -> int | None:
        pages = self.shapes.get("k_pages", self.shapes.get("v_pages"))
        return None if pages is None else pages[2 if self.hnd else 1]

    @property
    def pages(self) -> int:
        return self.shapes.get("k_pages", self.shapes.get("v_pages", (0,)))[0]

    @property
    def kv_heads(self) -> int | None:
        pages = self.shapes.get("k_pages", self.shapes.get("v_pages"))
        return None if pages is None else pages[1 if self.hnd else 2]

    def appended(self) -> np.ndarray | None:
        """The number of keys that append_kv adds to each sequence, `[n]`; None for any other call."""
        if self.page_size is None or not self.shapes.keys() & {"key", "value"}:
            return None
        if "cu_seqlens" in self.index:
            return np.diff(self.index["cu_seqlens"])
        return np.full_like(self.index["kv_lengths"], self.length("key", "value"))


def _host(name: str, x: Any) -> np.ndarray:
    """The values of an index array."""
    if isinstance(x, jax.core.Tracer):
        raise _CHECK.fail(
            f"{name} is traced; values are only known on the host, so call this outside jit", TypeError
        )
    x = _local(name, x)
    array = np.asarray(_CHECK.int32(name, x)) if isinstance(x, jax.Array) else _CHECK.host_int32(name, x)
    return array.astype(np.int64)


def _local(name: str, x: Any) -> Any:
    """x, if this process has all of its values."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        raise _CHECK.fail(
            f"{name} is split over several processes, got {x.sharding}; check the values of all of them, as "
            "jax.experimental.multihost_utils.process_allgather returns them"
        )
    return x


def _first(bad: np.ndarray) -> tuple[int, ...] | None:
    places = np.argwhere(bad)
    return tuple(int(i) for i in places[0]) if len(places) else None


def _item(name: str, array: np.ndarray, at: tuple[int, ...]) -> str:
    return f"{name}{list(at) if at else ''} = {array[at]}"


def _check_below(call: _Call, name: str, size: int, owner: str) -> None:
    array = call.index[name]
    at = _first((array < 0) | (array >= size))
    if at is not None:
        raise _CHECK.fail(
            f"{_item(name, array, at)} is outside the {size} rows of {owner}; allowed are 0 to {size - 1}"
        )


def _check_offsets(call: _Call, name: str) -> None:
    offsets = call.index[name]
    if offsets.size == 0:
        raise _CHECK.fail(f"{name} is empty; n sequences have n + 1 offsets")
    if offsets[0] != 0:
        raise _CHECK.fail(f"{_item(name, offsets, (0,))}; the first offset must be 0")
    at = _first(np.diff(offsets) < 0)
    if at is not None:
        here, before = _item(name, offsets, (at[0] + 1,)), _item(name, offsets, at)
        raise _CHECK.fail(f"{here} is less than {before}; offsets must not decrease")
    owner = "query" if name == "cu_seqlens_q" else "key"
    tokens = call.length(*(("query",) if owner == "query" else ("key", "value")))
    at = None if tokens is None else _first(offsets > tokens)
    if at is not None:
        raise _CHECK.fail(f"{_item(name, offsets, at)} is more than {owner}'s {tokens} tokens")


def _check_sequence_counts(call: _Call) -> None:
    """All arrays with one entry per sequence or batch entry must agree on their number."""
    (first, count), *others = call.sequence_counts().items() or [("", 0)]
    for name, other in others:
        if other != count:
            raise _CHECK.fail(f"{name} has {other} sequences, but {first} has {count}")


def _check_lengths(call: _Call, name: str) -> None:
    lengths = call.index[name]
    at = _first(lengths < 0)
    if at is not None:
        raise _CHECK.fail(f"{_item(name, lengths, at)}; a length must be at least 0")
    limit, what = _limit(call, name)
    added: Any = 0
    if name == "kv_lengths" and "block_tables" in call.index:
        appended = call.appended()
        added = 0 if appended is None else appended
    at = None if limit is None else _first(lengths + added > limit)
    if at is None:
        return
    got = f"{_item(name, lengths, at)} is"
    if np.ndim(added):
        got = f"{_item(name, lengths, at)} and {added[at]} keys to append are"
    raise _CHECK.fail(f"{got} more than {what} {np.broadcast_to(limit, lengths.shape)[at]}")


def _limit(call: _Call, name: str) -> tuple[Any, str]:
    """The largest value that each length may have, and its name for the message."""
    if name in ("q_lengths", "query_seq_lengths"):
        return call.length("query"), "query's length"
    if "block_tables" in call.index:
        if call.page_size is None:
            return None, ""
        capacity = call.index["block_tables"].shape[1] * call.page_size
        rotary = call.shapes.get("rotary")
        if rotary is not None and rotary[0] < capacity:
            return rotary[0], "the positions of rotary,"
        return capacity, "the capacity of its row of block_tables,"
    if call.page_size is not None:
        return None, ""
    offsets = call.index.get("cu_seqlens_k", call.index.get("cu_seqlens_q"))
    if offsets is not None:
        return np.diff(offsets), "the keys of its sequence,"
    return call.length("key", "value"), "key's length"


def _check_segments(call: _Call) -> None:
    for side, owner in (("q", "query"), ("kv", "key")):
        ids = call.index.get(f"{side}_segment_ids")
        if ids is None or owner not in call.shapes:
            continue
        shape = call.shapes[owner][:-2]
        if ids.shape != shape:
            raise _CHECK.fail(
                f"segment_ids has shape {ids.shape} for {owner}, whose batch and length are {shape}"
            )


def _mask_checker(call: _Call) -> MaskChecker:
    paged = "block_tables" in call.index
    keys = call.length("key", "value")
    if paged:
        keys = call.index["block_tables"].shape[1] * call.page_size if call.page_size else None
    packed_q = call.index.get("cu_seqlens_q")
    offsets = None if paged else call.index.get("cu_seqlens_k", packed_q)
    if offsets is not None:
        keys = int(np.diff(offsets).max(initial=0))
    neighbours = paged or packed_q is not None
    return MaskChecker(_CHECK, _host, keys, call.index.get("kv_lengths"), offsets, packed_q, neighbours)


def _check_pages(call: _Call) -> None:
    tables, lengths, size = call.index["block_tables"], call.index["kv_lengths"], call.page_size
    if not size:
        return
    new = call.appended()
    used = lengths if new is None else lengths + new
    holds_keys = np.arange(tables.shape[1]) * size < used[:, None]
    at = _first(holds_keys & ((tables < 0) | (tables >= call.pages)))
    if at is not None:
        raise _CHECK.fail(
            f"{_item('block_tables', tables, at)} is outside the pool of {call.pages} pages, "
            f"and sequence {at[0]} with {used[at[0]]} keys needs it"
        )
    if new is not None:
        _check_appended_slots(tables, lengths, new, size)


def _check_appended_slots(tables: np.ndarray, lengths: np.ndarray, new: np.ndarray, size: int) -> None:
    """Two sequences must not append to one slot of the pool."""
    row = np.repeat(np.arange(len(lengths)), new)
    position = np.concatenate([np.arange(n, n + k) for n, k in zip(lengths, new, strict=True)] or [row])
    page, slot = tables[row, position // size], position % size
    order = np.argsort(page * size + slot, kind="stable")
    at = _first(np.diff((page * size + slot)[order]) == 0)
    if at is not None:
        one, other = order[at[0]], order[at[0] + 1]
        raise _CHECK.fail(
            f"block_tables rows {row[one]} and {row[other]} both append to "
            f"page {page[one]}, slot {slot[one]}; sequences may share only pages that they do not write to"
        )


def _check_scale(call: _Call, name: str) -> None:
    """A float8 scale must have the pool's shape, and be finite and above 0 on every page that holds keys."""
    by_head, by_page = (call.kv_heads,), (call.pages, call.kv_heads)
    if call.kv_heads is not None and call.shapes[name] not in ((), by_head, by_page):
        raise _CHECK.fail(
            f"{name} must be a number or have shape [hk] = {by_head} or [p, hk] = {by_page}, got {call.shapes[name]}"
        )
    scale = call.scales.get(name)
    if scale is None:
        return
    wrong = ~(np.isfinite(scale) & (scale > 0))
    if call.page_size and scale.ndim == 2 and {"block_tables", "kv_lengths"} <= call.index.keys():
        tables, lengths = call.index["block_tables"], call.index["kv_lengths"]
        used = tables[np.arange(tables.shape[1]) * call.page_size < lengths[:, None]]
        wrong &= np.isin(np.arange(len(scale)), used)[:, None]
    at = _first(wrong)
    if at is not None:
        raise _CHECK.fail(f"{_item(name, scale, at)}; a scale must be finite and more than 0")
