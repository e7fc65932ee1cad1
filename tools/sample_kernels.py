"""Prints a kernel table with rows of csrc/kernels.def: one head dim for each arch, pass, design, loader and element.

    python tools/sample_kernels.py >build/sample.def      then cmake -DJAX_FLASH_KERNELS=build/sample.def

It compiles every loop of every family. Rows of float16 and bfloat16 alternate between the two. Its size, and the time
of `make cuda-compile`, grow with families, passes and loaders, but not with head dims.
"""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path

TABLE = Path(__file__).resolve().parents[1] / "csrc" / "kernels.def"
ROW = re.compile(r"JF_(?:KERNEL|FALLBACK)\((\w+), *(\w+), *(\w+), *(\w+), *(\w+)[ |\w]*, *(\d+), *(\d+),")
# Registers are scarcest in the backward and the paged forward at 128; elsewhere 64 has the most kinds of tiles.
HEAD_DIMS = {("backward", "dense"): 128, ("forward", "paged"): 128}
OTHERS = 64


def sample(lines: list[str]) -> list[str]:
    """The architectures, and the chosen rows in the table's order. A group without the head dim has its smallest
    one."""
    groups: dict[tuple[str, ...], list[tuple[tuple[int, int], str]]] = {}
    for line in lines:
        if row := ROW.match(line):
            arch, pass_, design, loader, element, d, dv = row.groups()
            for one in ("dense", "paged") if loader == "both" else (loader,):
                groups.setdefault((arch, pass_, design, one, element), []).append(((int(d), int(dv)), line))
    chosen: dict[str, set[str]] = {line: set() for line in lines if line.startswith("JF_ARCH(")}
    for (_, pass_, _, loader, _), rows in groups.items():
        wanted = (HEAD_DIMS.get((pass_, loader), OTHERS),) * 2
        pairs = [pair for pair, _ in rows]
        pair = wanted if wanted in pairs else min(pairs)
        for other, line in rows:
            if other == pair:
                chosen.setdefault(line, set()).add(loader)
    halves = itertools.cycle(("bfloat16", "float16"))
    return [
        re.sub(r"\bhalf\b", lambda _: next(halves), of_loaders(line, chosen[line]))
        for line in lines
        if line in chosen
    ]


def of_loaders(line: str, loaders: set[str]) -> str:
    """Restricts a row of both loaders to the one that was chosen."""
    return line if len(loaders) != 1 else re.sub(r"\bboth\b", min(loaders), line)


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in sample(TABLE.read_text().splitlines()))
