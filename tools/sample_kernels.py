"""Prints a kernel table with the rows of csrc/kernels.def of one head dim for each family, pass and group of dtypes.

    python tools/sample_kernels.py >build/sample.def      then cmake -DJAX_FLASH_KERNELS=build/sample.def

Every loop of every family is compiled from it, in every dtype. It grows with families and passes, not with head dims,
and so does the time of `make cuda-compile`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

TABLE = Path(__file__).resolve().parents[1] / "csrc" / "kernels.def"
ROW = re.compile(r"JF_(?:KERNEL|FALLBACK)\((\w+), *(\w+), *(\w+), *(\d+), *(\d+),")
# Where the registers are scarcest, and where the tables of most families hold the most tiles.
HEAD_DIMS = {"backward": "128", "paged_forward": "128"}
OTHERS = "64"


def sample(lines: list[str]) -> list[str]:
    """The rows chosen; of a group that lacks the head dim, its smallest."""
    groups: dict[tuple[str, ...], list[tuple[str, str, str]]] = {}
    for line in lines:
        if row := ROW.match(line):
            family, pass_, dtypes, d, dv = row.groups()
            groups.setdefault((family, pass_, dtypes), []).append((d, dv, line))
    chosen = []
    for (_, pass_, _), rows in groups.items():
        wanted = HEAD_DIMS.get(pass_, OTHERS)
        pairs = [(d, dv) for d, dv, _ in rows]
        pair = (wanted, wanted) if (wanted, wanted) in pairs else min(pairs, key=lambda x: tuple(map(int, x)))
        chosen += [line for d, dv, line in rows if (d, dv) == pair]
    return chosen


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in sample(TABLE.read_text().splitlines()))
