"""Splash attention's mask classes, and the structure of a mask that lets kernels skip instead of reading elements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_ELEMENTS = 1 << 24  # the elements of a mask that are evaluated together


class Mask:
    """A mask of queries × keys; `a & b` shows what both show, `a | b` what either shows."""

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def seen(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Whether query i sees key j, with the shape to which i and j broadcast."""
        raise NotImplementedError

    def __getitem__(self, index: Any) -> np.ndarray:
        if not isinstance(index, tuple) or len(index) != 2 or not all(isinstance(x, slice) for x in index):
            raise NotImplementedError(f"splash.{type(self).__name__}: index must be two slices, got {index}")
        rows, keys = (np.arange(size)[x] for size, x in zip(self.shape, index))
        found = self.seen(rows[:, None], keys[None, :])
        return np.broadcast_to(found, (len(rows), len(keys)))

    def __and__(self, other: Mask) -> Mask:
        return LogicalAnd(self, other)

    def __or__(self, other: Mask) -> Mask:
        return LogicalOr(self, other)

    def __bool__(self) -> bool:
        raise NotImplementedError("splash: a mask has no truth value; combine masks by & and |")


@dataclass(frozen=True)
class FullMask(Mask):
    """Every query sees every key."""

    _shape: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    def seen(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        return np.ones(np.broadcast_shapes(i.shape, j.shape), bool)


class _OfShape(Mask):
    """A mask whose first argument is its shape; `shard_count`, the last one, has no effect."""

    def __init__(self, shape: tuple[int, int], *of: Any):
        self._shape, self._of = tuple(shape), of

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and (self._shape, self._of) == (other._shape, other._of)

    def __hash__(self) -> int:
        return hash((type(self), self._shape, self._of))


class CausalMask(_OfShape):
    """Query i sees the keys up to i + offset."""

    def __init__(self, shape: tuple[int, int], offset: int = 0, shard_count: int = 1):
        super().__init__(shape, offset)
        self.offset = offset

    def seen(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        return np.asarray(j <= i + self.offset)


class LocalMask(_OfShape):
    """Query i sees the keys i + offset − left … i + offset + right; a side that is None is unlimited."""

    def __init__(
        self,
        shape: tuple[int, int],
        window_size: tuple[int | None, int | None],
        offset: int,
        shard_count: int = 1,
    ):
        super().__init__(shape, tuple(window_size), offset)
        self.window_size, self.offset = window_size, offset

    def seen(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        left, right = self.window_size
        found = np.ones(np.broadcast_shapes(i.shape, j.shape), bool)
        if left is not None:
            found &= i + self.offset - left <= j
        if right is not None:
            found &= j <= i + self.offset + right
        return found


class ChunkedCausalMask(_OfShape):
    """Query i sees the keys up to i of its own chunk of `chunk_size`."""

    def __init__(self, shape: tuple[int, int], chunk_size: int, shard_count: int = 1):
        if chunk_size < 1:
            raise ValueError(f"splash.ChunkedCausalMask: chunk_size must be at least 1, got {chunk_size}")
        super().__init__(shape, chunk_size)
        self.chunk_size = chunk_size

    def seen(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        return np.asarray((i // self.chunk_size == j // self.chunk_size) & (j <= i))


@dataclass(eq=False)
class NumpyMask(Mask):
    """A boolean array `[queries, keys]`."""

    array: np.ndarray

    def __post_init__(self) -> None:
        if self.array.ndim != 2 or self.array.dtype != np.bool_:
            raise ValueError(
                f"splash.NumpyMask: array must be boolean of rank 2, got {self.array.dtype} of shape {self.array.shape}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def seen(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        return np.asarray(self.array[i, j])


@dataclass(frozen=True)
class _Both(Mask):
    left: Any
    right: Any

    def __post_init__(self) -> None:
        if self.left.shape != self.right.shape:
            raise ValueError(
                f"splash: masks that are combined must have one shape, got {self.left.shape} and {self.right.shape}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.left.shape)


class LogicalAnd(_Both):
    """What both masks show."""

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.asarray(self.left[index] & self.right[index])


class LogicalOr(_Both):
    """What either mask shows."""

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.asarray(self.left[index] | self.right[index])


@dataclass(frozen=True)
class MultiHeadMask(Mask):
    """A mask for each query head."""

    masks: Sequence[Any]

    def __post_init__(self) -> None:
        got = sorted({tuple(x.shape) for x in self.masks})
        if len(got) != 1 or len(got[0]) != 2:
            wanted = "one of queries × keys for each head, all of one shape"
            raise ValueError(f"splash.MultiHeadMask: masks must be {wanted}, got {got}")

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.masks), *self.masks[0].shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        heads, *rest = index
        if isinstance(heads, int):
            return np.asarray(self.masks[heads][tuple(rest)])
        return np.stack([x[tuple(rest)] for x in self.masks[heads]])


def make_causal_mask(shape: tuple[int, int], offset: int = 0) -> np.ndarray:
    """`CausalMask` as an array."""
    return CausalMask(shape, offset)[:, :]


def make_local_attention_mask(
    shape: tuple[int, int], window_size: tuple[int | None, int | None], *, offset: int = 0
) -> np.ndarray:
    """`LocalMask` as an array."""
    return LocalMask(shape, window_size, offset)[:, :]


def make_chunk_attention_mask(shape: tuple[int, int], chunk_size: int) -> np.ndarray:
    """`ChunkedCausalMask` as an array."""
    return ChunkedCausalMask(shape, chunk_size)[:, :]


def make_random_mask(shape: tuple[int, int], sparsity: float, seed: int) -> np.ndarray:
    """Hides each key with probability `sparsity`: JAX's elements, without its effect on NumPy's global generator."""
    random = np.random.RandomState(seed)
    return random.binomial(n=1, p=1.0 - sparsity, size=shape).astype(np.bool_)


# --- what kernels skip by --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Band:
    """Keys i − left ≤ j ≤ i + right (None: no limit); with a chunk, only keys up to i in i's chunk."""

    left: int | None = None
    right: int | None = None
    chunk: int | None = None

    def __and__(self, other: Band) -> Band | None:
        if None not in (self.chunk, other.chunk) and self.chunk != other.chunk:
            return None
        left, right = _smaller(self.left, other.left), _smaller(self.right, other.right)
        return Band(left, right, self.chunk or other.chunk)

    def ranges(self, sq: int, sk: int) -> np.ndarray:
        """The one range of each row, int32 `[1, 2, sq]`."""
        i = np.arange(sq)
        lo = np.zeros(sq, int) if self.left is None else i - self.left
        hi = np.full(sq, sk) if self.right is None else i + self.right + 1
        if self.chunk is not None:
            lo, hi = np.maximum(lo, i // self.chunk * self.chunk), np.minimum(hi, i + 1)
        return np.asarray(np.clip([[lo, hi]], 0, sk), np.int32)


Found = Band | np.ndarray  # ranges are int32 [1 or 2, 2, sq], elements boolean [sq, sk]


def structure(mask: Any) -> Found:
    """The structure of a mask for one head: a band, else one or two ranges of keys for each row, else all elements."""
    band = _band(mask)
    if band is not None:
        return band
    sq, sk = mask.shape
    ranges = _ranges(mask, sq, sk)
    if ranges is None:
        return np.asarray(mask[:, :])
    band = _band_of_ranges(ranges, sk)
    return ranges if band is None else band


def _band(mask: Any) -> Band | None:
    """The band of a mask of this module or of JAX's, by the name of its class."""
    rows = getattr(mask, "q_sequence", None)
    if rows is not None and not np.array_equal(rows, np.arange(mask.shape[0])):
        return None  # JAX's masks may have queries in another order
    kind = type(mask).__name__
    if kind == "FullMask":
        return Band()
    if kind == "CausalMask":
        return Band(None, int(mask.offset))
    if kind == "LocalMask":
        left, right = mask.window_size
        offset = int(mask.offset)
        return Band(None if left is None else left - offset, None if right is None else right + offset)
    if kind == "ChunkedCausalMask":
        return Band(chunk=int(mask.chunk_size))
    if kind == "LogicalAnd":
        left, right = _band(mask.left), _band(mask.right)
        return None if left is None or right is None else left & right
    return None


def _ranges(mask: Any, sq: int, sk: int) -> np.ndarray | None:
    """The ranges of each row, int32 `[1 or 2, 2, sq]`; None if a row has more than two."""
    found = np.zeros((2, 2, sq), np.int32)
    step = max(_ELEMENTS // max(sk, 1), 1)
    for first in range(0, sq, step):
        seen = np.asarray(mask[first : min(first + step, sq), :], bool)
        edges = np.diff(seen.astype(np.int8), axis=1, prepend=0, append=0)
        for side, sign in enumerate((1, -1)):
            row, key = np.nonzero(edges == sign)  # in the order of the rows
            nth = np.arange(len(row)) - np.searchsorted(row, row)
            if (nth > 1).any():
                return None
            found[nth, side, first + row] = key
    return found if found[1].any() else found[:1]


def _band_of_ranges(ranges: np.ndarray, sk: int) -> Band | None:
    """The band that leaves these ranges, if there is one."""
    if len(ranges) > 1:
        return None
    lo, hi = ranges[0].astype(int)
    i = np.arange(len(lo))
    # Rows at the edge of the keys do not determine a side of the band, but all other rows do.
    inner_lo, inner_hi = (lo > 0) & (lo < hi), (hi < sk) & (lo < hi)
    left = int((i - lo)[inner_lo][0]) if inner_lo.any() else None
    right = int((hi - 1 - i)[inner_hi][0]) if inner_hi.any() else None
    band = Band(left, right)
    wanted = band.ranges(len(lo), sk)[0]
    empty = (lo >= hi) & (wanted[0] >= wanted[1])
    return band if (empty | (ranges[0] == wanted).all(0)).all() else None


def _smaller(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)
