"""The pairs of a query and a key over which a call computes attention, and its floating-point operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from ..spec import UNLIMITED, AttentionSpec

Shapes = Mapping[str, tuple[int, ...]]
Values = Mapping[str, np.ndarray]


class _Sequence(NamedTuple):
    """A batch entry or sequence: its rows and keys in use, and the first and the last key that row 0 sees by the band;
    None: no limit."""

    rows: int
    keys: int
    first: int | None
    last: int | None


# How many products along d and along dv each pass computes for a visible pair.
_PRODUCTS = {
    "forward": (1, 1),  # q·k; p·v
    "backward": (3, 2),  # q·k, ds·k and ds·q; do·v and p·do
    "tangent": (3, 2),  # q·k, tq·k and q·tk; p·tv and (p∘ds)·v
    "bias_gradient": (1, 1),  # q·k; do·v
}


def count(pass_: str, spec: AttentionSpec, shapes: Shapes, values: Values) -> int:
    """The FLOP of a pass from its operands' shapes, without leading dimensions, and those values that are known."""
    along_d, along_dv = _PRODUCTS[pass_]
    d, dv = shapes["query"][-1], spec.value_dim or shapes["value"][-1]
    return 2 * (along_d * d + along_dv * dv) * visible_pairs(spec, shapes, values)


def visible_pairs(spec: AttentionSpec, shapes: Shapes, values: Values) -> int:
    """The pairs (query, key) over which attention is computed, of all batch entries and query heads."""
    heads = shapes["query"][-2]
    sizes = _sizes(spec, shapes, values)
    limits = _ranges(sizes, values)
    if "draft_mask" in values and "ranges" not in values:
        drafts = np.broadcast_to(values["draft_mask"], (len(sizes), *values["draft_mask"].shape[1:]))
        few = [(x, ~m) for x, m in zip(sizes, drafts) if x.rows <= len(m)]  # others have no drafts
        hidden = sum(int((_picture_of_band(x) & _hidden_drafts(x, m)).sum()) for x, m in few)
        return heads * (sum(map(_in_band, sizes)) - hidden)
    others = values.keys() & {"mask", "bias", "block_mask", "q_segment_ids", "draft_mask"}
    if "ranges" in values and not others:
        return sum(_in_ranges(size, x) * (heads // len(x)) for size, x in zip(sizes, limits))
    if not others:
        return heads * sum(times * _in_band(size) for size, times in Counter(sizes).items())
    if others == {"block_mask"} and "ranges" not in values:
        masks = _block_masks(spec, sizes, values)
        return sum(_in_block_mask(spec, *x) * (heads // len(x[1])) for x in zip(sizes, masks))
    if others == {"q_segment_ids"} and "ranges" not in values:
        return heads * sum(_in_segments(size, *ids) for size, ids in zip(sizes, _segments(values)))
    masks = _block_masks(spec, sizes, values)
    return sum(_in_mask(spec, size, heads, entry, values, limits, masks) for entry, size in enumerate(sizes))


def _ranges(sizes: list[_Sequence], values: Values) -> list[np.ndarray]:
    """The limits of each batch entry or sequence, [h, rows, 2 | 4]."""
    if "ranges" not in values:
        return []
    x = values["ranges"].astype(np.int64)
    if x.ndim == 4:
        return [x[z if len(x) > 1 else 0][:, :rows] for z, (rows, *_) in enumerate(sizes)]
    return _of_sequences(x, sizes, values)


def _of_sequences(x: np.ndarray, sizes: list[_Sequence], values: Values) -> list[np.ndarray]:
    """The rows of each sequence in an array [h, packed rows, …]."""
    ends = np.cumsum([x.rows for x in sizes]) + int(np.clip(values["cu_seqlens_q"][0], 0, x.shape[1]))
    return [x[:, end - rows : end] for end, (rows, *_) in zip(ends, sizes)]


def _in_ranges(size: _Sequence, limits: np.ndarray) -> int:
    """The visible pairs of the heads that have ranges of their own; these are disjoint."""
    first, past = _rows(size)
    lo, hi = np.maximum(limits[..., 0::2], first[:, None]), np.minimum(limits[..., 1::2], past[:, None])
    return int(np.maximum(hi - lo, 0).sum())


def _sizes(spec: AttentionSpec, shapes: Shapes, values: Values) -> list[_Sequence]:
    """The rows and keys in use of each batch entry or sequence."""
    query, key = shapes["query"], shapes["key"]
    if "cu_seqlens_q" in shapes:
        rows = _differences("cu_seqlens_q", query[0], shapes, values)
    else:
        rows = _lengths("q_lengths", query[0], query[1], values)
    if spec.paged:
        keys = _lengths("kv_lengths", shapes["block_tables"][0], keys_of_entry(spec, shapes), values)
    elif "cu_seqlens_k" in shapes:
        keys = _differences("cu_seqlens_k", key[0], shapes, values)
        used = _lengths("kv_lengths", len(keys), key[0], values)
        keys = [min(*pair) for pair in zip(keys, used)]
    else:
        keys = _lengths("kv_lengths", key[0], keys_of_entry(spec, shapes), values)
    limits = [_band(spec, size, entry, values) for entry, size in enumerate(zip(rows, keys, strict=True))]
    return [_Sequence(*x) for x in zip(rows, keys, *zip(*limits))]


def keys_of_entry(spec: AttentionSpec, shapes: Shapes) -> int:
    """The keys of each batch entry, or of each row of block_tables, whatever the lengths are."""
    if not spec.paged:
        return shapes["key"][1]
    return shapes["block_tables"][1] * shapes["key"][spec.dims["key"].index("ps")]


def _band(
    spec: AttentionSpec, size: tuple[int, int], entry: int, values: Values
) -> tuple[int | None, int | None]:
    """The limits that the band sets row 0 of a batch entry or sequence; none that depends on data of unknown value."""
    offset, left, right = (_window(name, entry, spec, values) for name in ("offset", "left", "right"))
    if offset is None:
        return None, None
    if spec.align == "bottom_right":
        offset += size[1] - size[0]
    return None if left is None else offset - left, None if right is None else offset + right


def _window(name: str, entry: int, spec: AttentionSpec, values: Values) -> int | None:
    """A number of a batch entry's window; None if it is unlimited, or unknown."""
    of_call = {"left": spec.left, "right": spec.right, "offset": 0}[name]
    name = "window_" + name
    if name in spec.operands:
        x = values.get(name)
        return None if x is None else int(x[entry if len(x) > 1 else 0])
    return None if of_call == UNLIMITED else of_call


def _lengths(name: str, entries: int, size: int, values: Values) -> list[int]:
    if name not in values:
        return [size] * entries
    return [min(max(int(x), 0), size) for x in np.broadcast_to(values[name], (entries,))]


def _differences(name: str, tokens: int, shapes: Shapes, values: Values) -> list[int]:
    """The lengths of packed sequences; the tokens divided evenly where their offsets are not known."""
    if name in values:
        offsets = np.maximum.accumulate(np.clip(values[name].astype(np.int64), 0, tokens))
        return [int(x) for x in np.diff(offsets)]
    n = shapes[name][0] - 1
    return [tokens // n + (i < tokens % n) for i in range(n)]


def _rows(size: _Sequence) -> tuple[np.ndarray, np.ndarray]:
    """The first key that each row sees by its position, and the one past the last."""
    row = np.arange(size.rows, dtype=np.int64)
    first = np.zeros_like(row) if size.first is None else np.clip(row + size.first, 0, size.keys)
    past = np.full_like(row, size.keys)
    if size.last is not None:
        past = np.clip(row + size.last + 1, 0, size.keys)
    return first, np.maximum(past, first)


def _in_band(size: _Sequence) -> int:
    if size.first is None and size.last is None:
        return size.rows * size.keys
    first, past = _rows(size)
    return int((past - first).sum())


def _picture_of_band(size: _Sequence) -> np.ndarray:
    """Which pairs are in the band, [rows, keys]."""
    first, past = _rows(size)
    column = np.arange(size.keys)
    return (column >= first[:, None]) & (column < past[:, None])


def _hidden_drafts(size: _Sequence, hidden: np.ndarray) -> np.ndarray:
    """Which pairs of a sequence its draft mask hides, [rows, keys]."""
    rows, keys = size.rows, size.keys
    found = np.zeros((rows, keys), bool)
    if rows <= len(hidden):
        known = min(rows, keys)
        found[:, keys - known :] = hidden[:rows, rows - known : rows]
    return found


def _block_masks(spec: AttentionSpec, sizes: list[_Sequence], values: Values) -> list[np.ndarray]:
    """The block mask of each batch entry or sequence, [h | 1, blocks of rows, blocks of keys]."""
    if "block_mask" not in values:
        return []
    mask = values["block_mask"]
    if spec.packed and spec.block[0] == 1:
        return _of_sequences(mask[0], sizes, values)
    return [*np.broadcast_to(mask, (len(sizes), *mask.shape[1:]))]


def _in_blocks(spec: AttentionSpec, size: _Sequence, mask: np.ndarray) -> np.ndarray:
    """What a block mask shows of a sequence, [1, h | 1, rows, keys]."""
    lengths, blocks = size[:2], mask.shape[1:]
    row, key = (np.minimum(np.arange(n) // m, last) for n, m, last in zip(lengths, spec.block, blocks))
    return np.pad(mask, [(0, 0), (0, 1), (0, 1)])[None, :, row[:, None], key]


def _in_block_mask(spec: AttentionSpec, size: _Sequence, mask: np.ndarray) -> int:
    """The visible pairs of the heads that a block mask [h, rows, keys] has, without a picture of all pairs."""
    if not size.rows:
        return 0
    first, past = _rows(size)
    begin = np.arange(mask.shape[2]) * spec.block[1]
    keys = np.minimum(past[:, None], begin + spec.block[1]) - np.maximum(first[:, None], begin)
    of_blocks = np.add.reduceat(np.maximum(keys, 0), np.arange(0, size.rows, spec.block[0]), 0)[
        : mask.shape[1]
    ]
    return int((mask[:, : len(of_blocks)] * of_blocks).sum())


def _segments(values: Values) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return zip(values["q_segment_ids"], values["kv_segment_ids"])


def _in_segments(size: _Sequence, q_ids: np.ndarray, kv_ids: np.ndarray) -> int:
    """The visible pairs of a batch entry; keys are sorted by segment, and by position within each."""
    rows, keys = size.rows, size.keys
    names, segment = np.unique(kv_ids[:keys], return_inverse=True)
    sorted_keys = np.sort(segment.astype(np.int64) * (keys + 1) + np.arange(keys))
    own = np.searchsorted(names, q_ids[:rows])
    exists = np.append(names, 0)[own] == q_ids[:rows]
    exists &= own < len(names)
    first, past = (np.searchsorted(sorted_keys, own * (keys + 1) + x) for x in _rows(size))
    return int((past - first)[exists].sum())


def _in_mask(
    spec: AttentionSpec,
    size: _Sequence,
    heads: int,
    entry: int,
    values: Values,
    limits: list[np.ndarray],
    masks: list[np.ndarray],
) -> int:
    """The visible pairs of a batch entry and all heads, from the whole picture of one head after another."""
    rows, keys = size.rows, size.keys
    picture, column = _picture_of_band(size), np.arange(keys)
    if "q_segment_ids" in values:
        q_ids, kv_ids = values["q_segment_ids"][entry], values["kv_segment_ids"][entry]
        picture &= q_ids[:rows, None] == kv_ids[:keys]
    if "draft_mask" in values:
        drafts = values["draft_mask"]
        picture &= ~_hidden_drafts(size, ~drafts[entry if len(drafts) > 1 else 0])
    hides = [values["mask"]] if "mask" in values else []
    hides += [values["bias"] != -np.inf] if "bias" in values else []
    hides += [_in_blocks(spec, size, masks[entry])] if masks else []
    own_ranges = len(limits) > 0 and len(limits[entry]) > 1
    different = heads if own_ranges or any(x.shape[1] > 1 for x in hides) else 1
    total = 0
    for head in range(different):
        seen = picture
        if limits:
            x = limits[entry][head if own_ranges else 0]
            inside = [
                (x[:, i, None] <= column) & (column < x[:, i + 1, None]) for i in range(0, x.shape[1], 2)
            ]
            seen = seen & np.any(inside, 0)
        for x in hides:
            x = x[entry if x.shape[0] > 1 else 0, head if x.shape[1] > 1 else 0]
            seen = seen & x[: rows if x.shape[0] > 1 else 1, : keys if x.shape[1] > 1 else 1]
        total += int(seen.sum())
    return total * heads // different
