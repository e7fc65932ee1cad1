"""Every form of jax_flash.masks with random arrays, and its definition in numpy: which pairs are visible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_flash import masks

Sees = Callable[
    [int, Any, Any, Any], Any
]  # (sequence, heads [h, 1, 1], rows [1, s, 1], keys [1, 1, s]) → booleans


@dataclass(frozen=True)
class Sizes:
    """The sizes of a call. `rows` and `keys` are the dimensions of its arrays, or the longest sequences if packed."""

    lengths: tuple[tuple[int, int], ...]  # rows and keys in use, of each batch entry or sequence
    heads: int
    kv_heads: int
    rows: int
    keys: int
    starts: tuple[int, ...] = ()  # of packed sequences
    tokens: int = 0  # of packed queries
    key_starts: tuple[int, ...] = ()
    key_tokens: int = 0
    packed: bool = False

    def per_row(self, x: np.ndarray) -> np.ndarray:
        """Converts [n, …, rows] to the form that a call takes: for packed rows, [h, tokens]."""
        if not self.packed:
            return x
        made = np.zeros((*x.shape[1:-1], self.tokens), x.dtype)
        for z, (start, (rows, _)) in enumerate(zip(self.starts, self.lengths)):
            made[..., start : start + rows] = x[z, ..., :rows]
        return made

    def per_key(self, x: np.ndarray) -> np.ndarray:
        """Converts [n, keys] to the form that a call takes: for packed keys, [tokens], arbitrary past the lengths."""
        if not self.packed:
            return x
        made = np.full(self.key_tokens, -7, x.dtype)
        for z, (start, (_, keys)) in enumerate(zip(self.key_starts, self.lengths)):
            made[start : start + keys] = x[z, :keys]
        return made


def _int32(x: Any) -> Any:
    return jnp.asarray(x, jnp.int32)


def _causal(rng: Any, s: Sizes) -> tuple[masks.Mask, Sees]:
    offset = rng.integers(-3, 9, len(s.lengths))
    return masks.causal(_int32(offset)), lambda z, h, i, j: j <= i + offset[z]


def _band(rng: Any, s: Sizes) -> tuple[masks.Mask, Sees]:
    left, right, offset = (int(rng.integers(*x)) for x in ((0, 30), (0, 9), (-4, 9)))
    return masks.window(
        left, right, offset
    ), lambda z, h, i, j: (i + offset - left <= j) & (j <= i + offset + right)


def _window(rng: Any, s: Sizes) -> tuple[masks.Mask, Sees]:
    left, offset = rng.integers(0, 30, len(s.lengths)), rng.integers(0, 20, len(s.lengths))
    mask = masks.window(_int32(left), None, _int32(offset))
    return mask, lambda z, h, i, j: i + offset[z] - left[z] <= j


def _ranges(rng: Any, s: Sizes) -> tuple[masks.Mask, Sees]:
    heads = s.heads if rng.random() < 0.5 else 1
    limits = rng.integers(-2, s.keys + 3, (4, len(s.lengths), heads, s.rows))
    a, b, c, d = limits
    if rng.random() < 0.5:  # runs of 16 rows have the same ranges
        a, b, c, d = (np.repeat(x[..., ::16], 16, -1)[..., : s.rows] for x in limits)
    lo, hi, begin, end = (_int32(s.per_row(x)) for x in (a, b, c, d))

    def sees(z: int, h: Any, i: Any, j: Any) -> Any:
        own = [x[z][np.minimum(h, heads - 1), i] for x in (a, b, c, d)]
        return ((own[0] <= j) & (j < own[1])) | ((own[2] <= j) & (j < own[3]))

    return masks.ranges(lo, hi) | masks.ranges(begin, end), sees


def _prefix(rng: Any, s: Sizes) -> tuple[masks.Mask, Sees]:
    lengths = rng.integers(0, s.keys + 3, len(s.lengths))
    return masks.prefix_lm(_int32(lengths)), lambda z, h, i, j: (j <= i) | (j < lengths[z])


def _spans(rng: Any, s: Sizes) -> tuple[masks.Mask, Sees]:
    ids = np.repeat(rng.integers(-1, 3, (len(s.lengths), -(-s.rows // 5))), 5, -1)[:, : s.rows]

    def sees(z: int, h: Any, i: Any, j: Any) -> Any:
        run = np.cumsum(np.diff(ids[z], prepend=-9) != 0)  # the number of each row's run
        known = s.lengths[z][0] if s.packed else s.rows
        own = run[np.minimum(j, len(run) - 1)] == run[i] if len(run) else True
        return (j <= i) | ((ids[z][i] >= 0) & own & (j < known))

    return masks.bidirectional_spans(_int32(s.per_row(ids))), sees


def _chunked(rng: Any, s: Sizes) -> tuple[masks.Mask, Sees]:
    size = int(rng.integers(1, 40))
    return masks.chunked(size), lambda z, h, i, j: (j <= i) & (i // size == j // size)


def _first(rng: Any, s: Sizes) -> tuple[masks.Mask, Sees]:
    first, left = int(rng.integers(0, 9)), int(rng.integers(0, 20))
    mask = masks.first_and_window(first, left)
    return mask, lambda z, h, i, j: (j <= i) & ((j < first) | (j >= i - left))


def _diffusion(rng: Any, s: Sizes) -> tuple[masks.Mask, Sees]:
    block = int(rng.integers(1, 12))

    def sees(z: int, h: Any, i: Any, j: Any) -> Any:
        n = s.lengths[z][1] // 2
        noised = np.where(j < n, i // block == j // block, (j - n) // block < i // block)
        return np.where(
            i < n, noised & (j < 2 * n), (j >= n) & ((j - n) // block <= (i - n) // block) & (j < 2 * n)
        )

    return masks.block_diffusion(block), sees


def _either(rng: Any, s: Sizes) -> tuple[masks.Mask, Sees]:
    (a, in_a), (b, in_b) = _chunked(rng, s), _prefix(rng, s)
    return a | b, lambda z, h, i, j: in_a(z, h, i, j) | in_b(z, h, i, j)


def _positions(rng: Any, s: Sizes) -> tuple[masks.Mask, Sees]:
    n = len(s.lengths)
    q, k = (
        rng.integers(0, 2 * s.keys + 1, (n, s.rows)),
        np.sort(rng.integers(0, 2 * s.keys + 1, (n, s.keys)), -1),
    )
    left = int(rng.integers(0, 2 * s.keys + 1))
    mask = masks.by_position(_int32(s.per_row(q)), _int32(s.per_key(k)), window=(left, None))
    return mask, lambda z, h, i, j: (k[z][j] <= q[z][i]) & (k[z][j] >= q[z][i] - left)


def _segments(rng: Any, s: Sizes) -> tuple[masks.Mask, Sees]:
    q, k = (rng.integers(0, 3, (len(s.lengths), size)) for size in (s.rows, s.keys))
    if s.packed:  # each id is one run of neighbouring keys, and the ids are in any order
        k = rng.permutation(5)[np.sort(k, -1)]
    mask = masks.segments(_int32(s.per_row(q)), _int32(s.per_key(k)))
    return mask, lambda z, h, i, j: q[z][i] == k[z][j]


def _boolean(rng: Any, s: Sizes, draw: Callable[[tuple[int, ...]], np.ndarray]) -> tuple[masks.Mask, Sees]:
    """Of each row or of all, of each key or of all; in packed calls by sequence or by token, with keys left out.
    draw(shape) makes the array."""
    n, by_token = len(s.lengths), s.packed and (len(s.lengths) == 1 or rng.random() < 0.5)
    heads, rows, keys = (
        int(rng.choice([1, size])) if rng.random() < 0.4 else size for size in (s.heads, s.rows, s.keys)
    )
    if s.packed and keys > 2:
        keys -= int(rng.integers(0, 2))
    x = draw((1 if by_token and rows == 1 else n, heads, rows, keys))
    array = s.per_row(np.moveaxis(x, 2, 3))[None].swapaxes(2, 3) if by_token and rows != 1 else x
    return masks.dense(jnp.asarray(array)), lambda z, h, i, j: _element(x[z if len(x) > 1 else 0], h, i, j)


def _dense(rng: Any, s: Sizes) -> tuple[masks.Mask, Sees]:
    return _boolean(rng, s, lambda shape: rng.random(shape) < 0.7)


def _tiles(rng: Any, s: Sizes) -> tuple[masks.Mask, Sees]:
    """A boolean mask that hides whole tiles of a kernel, shows others whole, and leaves gaps between them."""

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        *outer, rows, keys = shape
        kinds = rng.random((*outer, rows // 64 + 1, keys // 64 + 1))  # of tiles: hidden, random or shown
        kinds = kinds.repeat(64, -2).repeat(64, -1)[..., :rows, :keys]
        return (kinds > 0.4) & ((kinds > 0.7) | (rng.random(shape) < 0.7))

    return _boolean(rng, s, draw)


def _function(rng: Any, s: Sizes) -> tuple[masks.Mask, Sees]:
    """Rows and keys of each sequence, with too many ranges for a form of ranges."""
    x = rng.random((len(s.lengths), int(rng.choice([1, s.heads])), s.rows, s.keys)) < 0.7
    x[..., :1, :5:2], x[..., :1, 1:5:2] = True, False
    sizes = dict(zip(("batch", "heads", "sq", "sk"), x.shape))
    mask = masks.from_function(lambda b, h, i, j: x[b, h, i, j], **sizes)
    return mask, lambda z, h, i, j: _element(x[z], h, i, j)


def _element(x: np.ndarray, h: Any, i: Any, j: Any) -> Any:
    """x [h | 1, rows | 1, keys | 1], False past its keys if it has several."""
    h, i = h if len(x) != 1 else 0 * h, i if x.shape[1] != 1 else 0 * i
    if x.shape[2] == 1:
        return x[h, i, 0 * j]
    return x[h, i, np.minimum(j, x.shape[2] - 1)] & (j < x.shape[2])


def _blocks(rng: Any, s: Sizes) -> tuple[masks.Mask, Sees]:
    (bq, bk), n = (16 * rng.integers(1, 4, 2)).tolist(), len(s.lengths)
    heads = int(rng.choice([1, s.kv_heads, s.heads]))
    columns = -(-s.keys // bk)
    # Rows past the last block see nothing.
    rows = max(0, -(-s.rows // bq) - int(s.packed and rng.random() < 0.5))
    chosen = rng.integers(-1, columns + 1, (n, heads, rows, int(rng.integers(1, columns + 2))))
    chosen[rng.random(chosen.shape) < 0.03] = rng.integers(-(2**31), 2**31)

    def sees(z: int, h: Any, i: Any, j: Any) -> Any:
        if rows == 0:
            return np.zeros(np.broadcast_shapes(h.shape, i.shape, j.shape), bool)
        own = chosen[z][h * heads // s.heads, np.minimum(i // bq, rows - 1)]  # [h, rows, 1, n]
        return (own == (j // bk)[..., None]).any(-1) & (i // bq < rows)

    return masks.blocks(_int32(chosen), (bq, bk)), sees


FORMS: dict[str, Callable[[Any, Sizes], tuple[masks.Mask, Sees]]] = {
    "causal": _causal, "band": _band, "window": _window, "ranges": _ranges, "prefix": _prefix, "spans": _spans,
    "chunked": _chunked, "first": _first, "diffusion": _diffusion, "either": _either, "positions": _positions,
    "segments": _segments, "dense": _dense, "tiles": _tiles, "blocks": _blocks, "function": _function,
}  # fmt: skip
TWO_RANGES = {"ranges", "first", "diffusion", "either"}  # `&` takes at most one of these


def make(names: Sequence[str], s: Sizes, seed: int) -> tuple[masks.Mask, list[np.ndarray]]:
    """These forms combined by `&`, and the pairs [h, rows, keys] in use that are visible in each sequence."""
    rng = np.random.default_rng(seed)
    made = [FORMS[name](rng, s) for name in names]
    mask = made[0][0]
    for other, _ in made[1:]:
        mask = mask & other
    shown = []
    for z, (rows, keys) in enumerate(s.lengths):
        place = np.ogrid[: s.heads, :rows, :keys]
        seen = np.ones((s.heads, rows, keys), bool)
        for _, sees in made:
            seen = seen & sees(z, *place)
        shown.append(seen)
    return mask, shown


def as_ranges(seen: np.ndarray) -> np.ndarray:
    """Writes each row's runs of visible keys, of which there are at most n, as limits […, rows, 2 · n]."""
    edges = np.diff(seen.astype(np.int8), axis=-1, prepend=0, append=0)
    found = np.zeros((*seen.shape[:-1], max(2, int((edges != 0).sum(-1).max(initial=0)))), np.int32)
    for place in np.ndindex(*seen.shape[:-1]):
        limits = np.flatnonzero(edges[place])
        found[(*place, slice(limits.size))] = limits
    return found


def of_case(case: Any) -> tuple[masks.Mask, dict[str, Any]]:
    """The mask of a Case as a value of jax_flash.masks, and the oracle's operand, which is made without the library: a
    boolean array of all pairs or, for packed sequences, the limits of ranges."""
    lengths = _sequence_lengths(case)
    if case.layout == "fixed":
        mask, shown = make(case.forms, Sizes(lengths, case.hq, case.hk, case.sq, case.sk), case.form_seed)
        array = np.zeros((case.b, case.hq, case.sq, case.sk), bool)
        for z, (nq, nk) in enumerate(lengths):
            array[z, :, :nq, :nk] = shown[z]
        return mask, {"mask": jnp.asarray(array)}
    rows, keys = zip(*lengths) if lengths else ((), ())
    starts = tuple(int(x) for x in np.concatenate([[0], np.cumsum(rows)])[:-1])
    tokens = sum(rows) + case.padding[0]
    given = case.q_sequences if case.k_sequences is None else case.k_sequences
    key_starts = tuple(int(x) for x in np.concatenate([[0], np.cumsum(given)])[:-1])
    sizes = Sizes(
        lengths, case.hq, case.hk, max(rows, default=0), max(keys, default=0),
        starts, tokens, key_starts, sum(given) + case.padding[1], packed=True,
    )  # fmt: skip
    mask, shown = make(case.forms, sizes, case.form_seed)
    runs = [as_ranges(seen) for seen in shown]
    limits = np.zeros((case.hq, tokens, max((x.shape[-1] for x in runs), default=2)), np.int32)
    for start, nq, x in zip(starts, rows, runs):
        limits[:, start : start + nq, : x.shape[-1]] = x
    return mask, {"ranges": jnp.asarray(limits)}


def _sequence_lengths(case: Any) -> tuple[tuple[int, int], ...]:
    """The rows and the keys in use of each batch entry or sequence."""
    if case.layout == "fixed":
        pairs = ((case.q_lengths, case.sq), (case.kv_lengths, case.sk))
        found = [[min(max(n, 0), size) for n in given or [size] * case.b] for given, size in pairs]
        return tuple(zip(*found))
    keys = case.q_sequences if case.k_sequences is None else case.k_sequences
    used = keys if case.kv_lengths is None else (min(k, max(n, 0)) for k, n in zip(keys, case.kv_lengths))
    return tuple(zip(case.q_sequences, used))
