"""The planted bugs of tests/mutants, and the rows of csrc/kernels.def that the tests of those for a GPU need."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LISTS = ROOT / "tests" / "mutants"
RUNS = ("cpu", "guards", "emulated", "gpu")


class Stale(Exception):
    """The text that a mutant replaces is missing, or occurs more than once."""


@dataclass(frozen=True)
class Mutant:
    """One planted bug.

    `breaks` is the promise that it breaks; `tests` are pytest's arguments for the tests nearest to it. `runs` says
    where they run: "cpu" (this machine, Python and the CPU kernels), "emulated" (CUDA kernels on
    tests/kernels/emulator), "guards" (the drivers of tests/kernels/guards, which `tests` then names) or "gpu". `isa`:
    the CPU instruction set whose code has the bug. `objects`: the CUDA object files that are built with the bug, by
    parts of their names; empty: all.
    """

    name: str
    file: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...]
    runs: str
    group: str
    isa: str = ""
    objects: tuple[str, ...] = ()

    def planted(self, text: str) -> str:
        count = text.count(self.old)
        if count != 1:
            raise Stale(f"its text occurs {count} times in {self.file}")
        return text.replace(self.old, self.new)


def load(folder: Path = LISTS) -> list[Mutant]:
    """The mutants of every list, those in Python first, then sorted by file, so that little is rebuilt between two."""
    found = []
    for path in sorted(folder.glob("*.toml")):
        content = tomllib.loads(path.read_text())
        for entry in content["mutant"]:
            known = {"runs": content["runs"], "group": path.stem} | entry
            lists = {name: tuple(known.get(name, ())) for name in ("tests", "objects")}
            found.append(Mutant(**known | lists))
    return sorted(found, key=lambda x: (RUNS.index(x.runs), x.file.startswith("csrc"), x.isa, x.file))


def gpu_rows(folder: Path = LISTS) -> tuple[str, ...]:
    """The rows of csrc/kernels.def that the tests of GPU mutants need (planted_library.table)."""
    lists = [tomllib.loads(path.read_text()) for path in sorted(folder.glob("*.toml"))]
    return tuple(row for content in lists for row in content.get("rows", ()))


def rows_for(mutants: list[Mutant], rows: tuple[str, ...]) -> tuple[str, ...]:
    """The `rows` whose head dims are those of kernels with one of these mutants; their tests run no others."""
    objects = [x for mutant in mutants for x in mutant.objects or ("",)]

    def head_dims(row: str) -> tuple[str, ...]:
        return tuple(row.partition(":")[0].split()[3:5])

    def file(row: str) -> str:
        arch, pass_, loader, d = row.partition(":")[0].split()[:4]
        return f"{pass_}_{loader}_{arch}_d{d}"

    wanted = {head_dims(row) for row in rows if any(x in file(row) for x in objects)}
    return tuple(row for row in rows if head_dims(row) in wanted)


def stale(mutants: list[Mutant]) -> Iterator[tuple[Mutant, str]]:
    for mutant in mutants:
        file = ROOT / mutant.file
        try:
            mutant.planted(file.read_text() if file.exists() else "")
        except Stale as error:
            yield mutant, str(error)
