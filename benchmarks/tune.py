"""Times candidates for rows of csrc/kernels.def in one process, each in a CUDA library of its own.

python -m benchmarks.tune "sm80, forward, both, half, 128, 128, 128, 64, 1, 4, 1, 1, 1, plain" "sm80, forward, …"

A candidate has the arguments of a JF_KERNEL; ";" separates several rows of one candidate. In the candidate's library
they replace all rows, of any arch, with the same pass, loader, element and head dims. "table" is the library of the
unchanged table. The cells are those of --compare (benchmarks/compare_cells.py) whose names fit the pass and the head
dim. Needs this checkout built in place (tools/build_inplace.sh), nvcc and, unless --build-only, a GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import jax

from tools import cuda_library

from . import compare, compare_cells, measure, other_checkout

TABLE = cuda_library.ROOT / "csrc" / "kernels.def"
FOLDER = cuda_library.ROOT / "build" / "tune"
DTYPES = {"half": "bfloat16", "single": "float32"}  # dtypes of the libraries
LOADERS = {"dense", "paged"}  # the words for one loader; any other word in the table stands for both
# pass → the words in the names of its cells; for each head dim, those with that dim are selected.
CELLS = {"forward": "forward", "backward": "backward", "bias_gradient": "bias backward", "decode": "decode"}

Row = dict[str, str]  # column → value


def columns(table: str) -> list[str]:
    """The names of the columns, from the table's own comment."""
    found = re.search(r"^// JF_KERNEL\(([^)]*)\)", table, re.MULTILINE)
    if found is None:
        raise ValueError("csrc/kernels.def has no comment `// JF_KERNEL(column, …)` that names its columns")
    return [name.strip() for name in found[1].split(",")]


def parse_rows(text: str, names: list[str]) -> list[Row]:
    """The rows of a candidate, with or without `JF_KERNEL(…)` around each."""
    rows = []
    for row in text.split(";"):
        values = [x.strip() for x in row.strip().removeprefix("JF_KERNEL(").removesuffix(")").split(",")]
        if len(values) != len(names):
            raise ValueError(f"a row has the columns {', '.join(names)}; got {row.strip()!r}")
        rows.append(dict(zip(names, values)))
    return rows


def replaces(new: Row, old: Row) -> bool:
    """Whether a candidate's row replaces a row of the table."""
    same = all(new[column].split()[0] == old[column].split()[0] for column in ("pass", "element", "d", "dv"))
    loaders = [{row["loader"]} if row["loader"] in LOADERS else LOADERS for row in (new, old)]
    return same and bool(loaders[0] & loaders[1])


def table_with(candidate: list[Row], table: str) -> str:
    """The text of a table with the candidate's rows."""
    names, kept = columns(table), []
    for line in table.splitlines():
        row = re.match(r"JF_(?:KERNEL|FALLBACK)\((.*)\)", line)
        if row and any(replaces(new, parse_rows(row[1], names)[0]) for new in candidate):
            continue
        kept.append(line)
    made = [f"JF_KERNEL({', '.join(row.values())})" for row in candidate]
    return "\n".join([*kept, *made, ""])


def build(name: str, candidate: list[Row], like: Row, archs: str, parallel: int) -> tuple[Path | None, str]:
    """A folder with jax_flash/ and the candidate's library, and the bytes that it spills; or None, and why there is
    none."""
    folder = FOLDER / re.sub(r"[^\w]+", "_", name)[:100]
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "kernels.def"
    table.write_text(table_with(candidate, TABLE.read_text()))
    head_dims = like["d"] if like["d"] == like["dv"] else f"{like['d']}/{like['dv']}"
    defines = {
        "JAX_FLASH_KERNELS": table,
        "JAX_FLASH_HEAD_DIMS": head_dims,
        "JAX_FLASH_DTYPES": DTYPES[like["element"].split(" ")[0]],
    }
    try:
        library = cuda_library.build(archs, folder, defines, parallel)
    except cuda_library.BuildError as error:
        return None, f"not built: {str(error).splitlines()[0]}"
    package = folder / "jax_flash"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(
        cuda_library.ROOT / "jax_flash",
        package,
        ignore=shutil.ignore_patterns("libjax_flash_cuda*", "__pycache__"),
    )
    shutil.copy(library, package)
    spilled = [n for kernel, n in cuda_library.spills(library).items() if kernel.startswith(like["pass"])]
    return folder, f"spills {'/'.join(map(str, spilled))}"


def cells_of(like: Row, wanted: str) -> list[compare_cells.Cell]:
    """The cells of a row's pass and head dim."""
    chosen = []
    for cell in compare_cells.of_platform("gpu"):
        words = cell.name.split()
        dims = {f"d{like['d']}", f"d{like['d']}/{like['dv']}"}
        pages = like["loader"] == "paged" and like["pass"] == "forward"
        fits = cell.name.startswith("prefill") if pages else CELLS[like["pass"]] in cell.name
        if fits and dims & set(words) and compare.selected(cell.name, wanted):
            chosen.append(cell)
    return chosen


def time_cell(cell: compare_cells.Cell, packages: dict[str, ModuleType], repeats: int) -> str:
    """One line: milliseconds of each candidate."""
    calls = {}
    for name, package in packages.items():
        try:
            calls[name] = cell.prepare(package)
            compare.compile_and_run(calls[name])
        except Exception as error:  # such as that the candidate's table lacks the kernel
            calls.pop(name, None)
            print(f"{cell.name}: {name}: {type(error).__name__}: {error}".splitlines()[0], flush=True)
    times = measure.in_turns(calls, repeats)
    each = (f"{name} {t['median'] / cell.calls * 1e3:.4f} ±{t['spread']:.1%}" for name, t in times.items())
    return f"{cell.name}, ms: {', '.join(each)}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "candidates", nargs="+", metavar="ROWS", help="the arguments of JF_KERNEL, `;` between rows"
    )
    parser.add_argument("--filter", default="", metavar="TEXT", help="only cells whose name holds this")
    parser.add_argument("--archs", default="90a-real", help="JAX_FLASH_CUDA_ARCHS of the build")
    parser.add_argument("--repeats", type=int, default=measure.REPEATS)
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 2, help="of all builds together; default all cores"
    )
    parser.add_argument("--build-only", action="store_true", help="needs no GPU")
    options = parser.parse_args(arguments)
    names = columns(TABLE.read_text())
    candidates = {text: parse_rows(text, names) for text in options.candidates}
    like = next(iter(candidates.values()))[0]
    candidates = {"table": []} | candidates
    at_once = min(8, len(candidates), options.jobs)
    parallel = options.jobs // at_once
    with ThreadPoolExecutor(at_once) as pool:
        built = list(pool.map(lambda x: build(*x, like, options.archs, parallel), candidates.items()))
    for name, (_, said) in zip(candidates, built, strict=True):
        print(f"{name}: {said}", flush=True)
    if options.build_only:
        return 0
    if jax.default_backend() != "gpu":
        parser.error("candidates are timed on a GPU; elsewhere --build-only")
    packages = {
        name: other_checkout.load(folder, f"jax_flash_candidate_{i}")
        for i, (name, (folder, _)) in enumerate(zip(candidates, built, strict=True))
        if folder is not None
    }
    for cell in cells_of(like, options.filter):
        print(time_cell(cell, packages, options.repeats), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
