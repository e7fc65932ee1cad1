"""The checks of `check_inputs` for the values of a mask's index arrays, on the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checker import Checker
from ..masks import Mask
from . import conjunctions, forms

Host = Callable[[str, Any], np.ndarray]


@dataclass(frozen=True)
class MaskChecker:
    """keys: the keys that a batch entry or sequence can have, if known. lengths: the keys in use of each, if known.
    offsets, q_offsets: where the sequences begin in packed keys and their rows in packed queries. neighbours: whether a
    segment's keys must be adjacent."""

    check: Checker
    host: Host
    keys: int | None
    lengths: np.ndarray | None
    offsets: np.ndarray | None
    q_offsets: np.ndarray | None
    neighbours: bool

    def run(self, mask: Mask) -> None:
        for condition in conjunctions.flat(mask.conditions):
            for kind, check in _CHECKS.items():
                if isinstance(condition, kind):
                    check(self, condition)

    def fail_at(self, bad: np.ndarray, name: str, x: np.ndarray, rule: str) -> None:
        """Raises for the first of the bad places."""
        places = np.argwhere(bad)
        if len(places):
            at = tuple(int(i) for i in places[0])
            raise self.check.fail(f"mask's {name}{list(at) if at else ''} = {x[at]}; {rule}")

    def runs(self, x: np.ndarray) -> list[tuple[str, np.ndarray]]:
        """The elements of each sequence's keys in use, with a name for messages."""
        if self.offsets is not None:
            ends = zip(self.offsets[:-1], self.offsets[1:])
            rows = [x.reshape(-1)[begin:end] for begin, end in ends]
        else:
            rows = list(np.atleast_2d(x))
        lengths = self.lengths
        if lengths is not None and len(rows) == 1:  # the keys may be shared by all entries
            lengths = lengths.max(initial=0, keepdims=True)
        if lengths is not None and len(lengths) == len(rows):
            rows = [row[: max(int(n), 0)] for row, n in zip(rows, lengths)]
        return [(f" of row {z}" if len(rows) > 1 else "", row) for z, row in enumerate(rows)]

    def parts(self, rows: int) -> list[tuple[str, int | None, slice]]:
        """Parts of an array of so many rows, with a name for messages and the keys that its rows can have: packed
        tokens by their sequences, other rows together."""
        if self.offsets is None or self.q_offsets is None or rows < max(2, self.q_offsets[-1]):
            return [("", self.keys, slice(None))]
        ends = zip(np.diff(self.offsets), self.q_offsets[:-1], self.q_offsets[1:])
        return [(f" of row {z}", int(keys), slice(begin, end)) for z, (keys, begin, end) in enumerate(ends)]


def _ranges(own: MaskChecker, x: forms.Ranges) -> None:
    for limits in x.limits:
        lo, hi = np.broadcast_arrays(*(own.host(f"mask's {n}", v) for n, v in zip(("lo", "hi"), limits)))
        own.fail_at(lo > hi, "lo", lo, "a range begins at or before its end, hi")
        for where, keys, part in own.parts(lo.shape[-1] if lo.ndim and not x.by_sequence else 1):
            most = "the number of keys" if keys is None else f"the {keys} keys"
            for name, limit in (("lo", lo), ("hi", hi)):
                values = limit[..., part] if limit.ndim else limit
                outside = values < 0 if keys is None else (values < 0) | (values > keys)
                own.fail_at(outside, name + where, values, f"a range lies within 0 and {most}")


def _blocks(own: MaskChecker, x: forms.Blocks) -> None:
    chosen = own.host("mask's chosen blocks", x.chosen)
    own.fail_at(chosen < -1, "chosen", chosen, "an index is at least 0, or -1 for none")
    if own.keys is not None:
        blocks = -(-own.keys // x.block[1])
        rule = f"{own.keys} keys have {blocks} blocks of {x.block[1]}"
        own.fail_at(chosen >= blocks, "chosen", chosen, rule)
    order = np.argsort(chosen, -1, kind="stable")
    ordered = np.take_along_axis(chosen, order, -1)
    again = np.zeros(chosen.shape, bool)
    twice = np.diff(ordered, axis=-1, prepend=-1) == 0
    np.put_along_axis(again, order, twice & (ordered >= 0), -1)
    own.fail_at(again, "chosen", chosen, "a block of keys is chosen once for a block of rows")


def _positions(own: MaskChecker, x: forms.Positions) -> None:
    for where, row in own.runs(own.host("mask's kv_positions", x.kv_positions)):
        falls = np.diff(row, prepend=row[:1]) < 0
        own.fail_at(falls, f"kv_positions{where}", row, "the positions of keys must not decrease")


def _segments(own: MaskChecker, x: forms.Segments) -> None:
    if not own.neighbours:
        return
    for where, row in own.runs(own.host("mask's segments of keys", x.kv_ids)):
        first = np.flatnonzero(np.diff(row, prepend=row[:1] - 1) != 0)  # indices at which runs begin
        _, kept = np.unique(row[first], return_index=True)
        again = np.zeros(row.shape, bool)
        again[np.delete(first, kept)] = True
        rule = "in packed and paged calls the keys of a segment are neighbours"
        own.fail_at(again, f"segments of keys{where}", row, rule)


_CHECKS: Mapping[type, Callable[[MaskChecker, Any], None]] = {
    forms.Ranges: _ranges,
    forms.Blocks: _blocks,
    forms.Positions: _positions,
    forms.Segments: _segments,
}
