"""The structure of a boolean array of rows and keys on the host: ranges of each row, or blocks of rows and keys."""

from __future__ import annotations

import numpy as np

BLOCKS = (256, 128)  # with smaller blocks kernels are slower than with the boolean array itself


def ranges_of(seen: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """The first keys and the ends of the one or two ranges of each row, if no row has more."""
    edges = np.diff(seen.astype(np.int8), axis=-1, prepend=0, append=0)
    starts, ends = edges == 1, edges == -1
    most = int(starts.sum(-1).max(initial=0))
    if most > 2:
        return None
    pairs = []
    for k in range(max(most, 1)):
        has = starts.sum(-1) > k
        lo, hi = (np.where(has, (np.cumsum(x, -1) == k + 1).argmax(-1), 0) for x in (starts, ends))
        pairs.append((lo, hi))
    return pairs


def blocks_of(seen: np.ndarray) -> tuple[np.ndarray, int] | None:
    """The visible blocks of keys of each block of rows, [b, h, blocks, n], −1 for none, and the size of a block; None
    if some block is visible in part."""
    *lead, sq, sk = seen.shape
    for size in BLOCKS:
        rows, keys = -(-sq // size), -(-sk // size)
        if min(rows, keys) < 2:
            continue
        padding = [(0, 0)] * len(lead) + [(0, rows * size - sq), (0, keys * size - sk)]
        tiles = np.pad(seen, padding, mode="edge").reshape(*lead, rows, size, keys, size)
        shown = tiles.any((-3, -1))
        if (shown == tiles.all((-3, -1))).all():
            order = np.argsort(~shown, axis=-1, kind="stable")[
                ..., : max(1, int(shown.sum(-1).max(initial=0)))
            ]
            return np.where(np.take_along_axis(shown, order, -1), order, -1).astype(np.int32), size
    return None
