"""The boolean array of a function, and its structure on the host: ranges of each row, or blocks of rows and keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ..checker import Checker

BLOCKS = (256, 128)  # with smaller blocks kernels are slower than with the boolean array itself


def evaluated(check: Checker, f: Callable[..., Any], shape: tuple[int, int, int, int]) -> np.ndarray:
    """f(b, h, i, j) as [b|1, h|1, sq, sk], with one entry or head where f ignores them."""
    try:
        made = f(*np.ogrid[tuple(map(slice, shape))])
    except Exception as error:
        error.add_note(
            f"{check.op}: f is called as f(b, h, i, j), with integer arrays that broadcast against each other; it "
            "returns booleans, combined by &, | and ~ instead of and, or, not and if"
        )
        raise
    if isinstance(made, jax.core.Tracer):
        raise check.fail(
            "f depends on a value that is traced, and is evaluated while tracing; masks.ranges(…) and masks.dense(…) "
            "take such arrays",
            TypeError,
        )
    made = np.asarray(made)
    # Numbers to add to the scores are refused, since 0 shows a key in these.
    if made.dtype.kind not in "biu" or ((made != 0) & (made != 1)).any():
        raise check.fail(f"f must return booleans (True = may attend), got {made.dtype}", TypeError)
    if made.ndim > 4 or not all(n in (1, size) for n, size in zip(made.shape[::-1], shape[::-1])):
        raise check.fail(f"f must return booleans that broadcast to {shape}, got shape {made.shape}")
    lead = (1,) * (4 - made.ndim) + made.shape
    return np.broadcast_to(made.astype(bool), (*lead[:2], *shape[2:]))


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
            most = max(1, int(np.max(shown.sum(-1), initial=0)))
            order = np.argsort(~shown, axis=-1, kind="stable")[..., :most]
            return np.where(np.take_along_axis(shown, order, -1), order, -1).astype(np.int32), size
    return None
