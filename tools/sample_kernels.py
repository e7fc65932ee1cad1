"""Prints a kernel table with rows of csrc/kernels.def: one head dim for each arch, pass, design, loader and element.

    python tools/sample_kernels.py >build/sample.def      then cmake -DJAX_FLASH_KERNELS=build/sample.def

It compiles every loop of every family with every kind of score. Rows of float16 and bfloat16 alternate between the two.
The portable kernels of float32 and of sm_75 are the templates of sm_80's 16-bit kernels, so they are compiled with the
plainest and the most general kind alone, sm_75's of float32 with the plainest. sm_90 gets one portable row of each pass
and design. The others are printed as fallbacks, which are built only for devices with less shared memory.

The time of `make cuda-compile` grows with families, passes and loaders, but not with head dims.
"""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path

TABLE = Path(__file__).resolve().parents[1] / "csrc" / "kernels.def"
ROW = re.compile(r"JF_KERNEL\((\w+), *(\w+), *(\w+), *(\w+), *(\w+)[ |\w]*, *(\d+), *(\d+),")
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
    table = [line for line in lines if line in chosen]
    newest = {row.group(1, 2, 3): line for line in table if (row := ROW.match(line))}.values()
    halves = itertools.cycle(("bfloat16", "float16"))
    return [
        re.sub(r"\bhalf\b", lambda _: next(halves), reduced(line, chosen[line], line in newest))
        for line in table
    ]


def reduced(line: str, loaders: set[str], for_newest: bool) -> str:
    """The row with the loader that was chosen, if that is one of both, and with fewer devices or kinds of scores."""
    if len(loaders) == 1:
        line = re.sub(r"\bboth\b", min(loaders), line)
    if line.startswith("JF_KERNEL(sm80") and not for_newest:
        line = line.replace("KERNEL", "FALLBACK", 1)
    if "(sm75" in line or " single" in line:
        largest = "general_dropout" if "general_dropout" in line else "general"
        kinds = "plain" if "(sm75" in line and " single" in line else f"plain | {largest}"
        line = re.sub(r"\bplain \| general.*\)", f"{kinds})", line)
    return line


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in sample(TABLE.read_text().splitlines()))
