"""Prints a kernel table with the rows of csrc/kernels.def of one head dim for each arch, pass, loader and dtypes.

    python tools/sample_kernels.py >build/sample.def      then cmake -DJAX_FLASH_KERNELS=build/sample.def

Every loop of every family is compiled from it, in every dtype. It grows with archs and passes, not with head dims, and
so does the time of `make cuda-compile`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

TABLE = Path(__file__).resolve().parents[1] / "csrc" / "kernels.def"
ROW = re.compile(r"JF_(?:KERNEL|FALLBACK)\((\w+), *(\w+), *(\w+), *(\w+), *(\d+), *(\d+),")
# Registers are scarcest in the backward and the paged forward at 128; elsewhere 64 has the most kinds of tiles.
HEAD_DIMS = {("backward", "dense"): "128", ("forward", "paged"): "128"}
OTHERS = "64"


def sample(lines: list[str]) -> list[str]:
    """The lines chosen, with all archs; a group that lacks the head dim has its smallest."""
    groups: dict[tuple[str, ...], list[tuple[str, str, str]]] = {}
    for line in lines:
        if row := ROW.match(line):
            arch, pass_, loader, dtypes, d, dv = row.groups()
            groups.setdefault((arch, pass_, loader, dtypes), []).append((d, dv, line))
    chosen = [line for line in lines if line.startswith("JF_ARCH(")]
    for (_, pass_, loader, _), rows in groups.items():
        wanted = HEAD_DIMS.get((pass_, loader), OTHERS)
        pairs = [(d, dv) for d, dv, _ in rows]
        pair = (wanted, wanted) if (wanted, wanted) in pairs else min(pairs, key=lambda x: tuple(map(int, x)))
        chosen += [line for d, dv, line in rows if (d, dv) == pair]
    return chosen


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in sample(TABLE.read_text().splitlines()))
