"""Builds the CUDA library alone, without the Python extension: with nvcc, or for the host emulator of its instructions.

python tools/cuda_library.py --emulated [--head-dims "64;128"]      into build/emulated: needs cmake, no nvcc, no GPU
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = ROOT / "tests" / "kernels" / "emulator"
EMULATED = ROOT / "build" / "emulated" / "libjax_flash_cuda.so"
PASSES = re.findall(r"JF_(?:APPEND_|CUDA_)?PASS\((\w+), *(\w+),", (ROOT / "csrc" / "results.def").read_text())
HANDLERS = {name: f"JaxFlash{id_}Cuda" for id_, name in PASSES}


class BuildError(Exception):
    """The compiler's message."""


def build(
    archs: str, folder: Path, defines: dict[str, Any] | None = None, parallel: int | None = None
) -> Path:
    """The library for these JAX_FLASH_CUDA_ARCHS, in a build folder that keeps its build.log."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    settings = {"Python_EXECUTABLE": sys.executable, "JAX_FLASH_MODULE": "OFF", "JAX_FLASH_CUDA": "ON"}
    settings |= {"JAX_FLASH_CUDA_ARCHS": archs, "JAX_FLASH_BUDGET": "OFF", **(defines or {})}
    configure = ["cmake", "-S", ROOT, "-B", folder, *generator, *(f"-D{k}={v}" for k, v in settings.items())]
    compile_ = ["cmake", "--build", folder, "--parallel", str(parallel or os.cpu_count())]
    log = folder / "build.log"
    with log.open("w") as out:
        for command in (configure, compile_):
            if subprocess.run(command, stdout=out, stderr=out).returncode:
                errors = [line for line in log.read_text().splitlines() if "error" in line.lower()]
                raise BuildError("\n".join(errors) or log.read_text()[-4000:])
    return folder / "libjax_flash_cuda.so"


def spills(library: Path) -> dict[str, int]:
    """The bytes that each kernel of a library just built spills, by its name and arch."""
    rows = [x.split("\t") for x in (library.parent / "cuda_resources.tsv").read_text().splitlines()]
    columns = {name: i for i, name in enumerate(rows[0])}
    return {f"{x[columns['kernel']]} {x[columns['arch']]}": int(x[columns["spills"]]) for x in rows[1:]}


def build_emulated(head_dims: str, archs: str, parallel: int) -> Path:
    """The library on the emulator, with the rows of these JAX_FLASH_HEAD_DIMS (empty: all) for these archs."""
    folder = EMULATED.parent
    defines = {
        "Python_EXECUTABLE": sys.executable,
        "JAX_FLASH_HEAD_DIMS": head_dims,
        "JAX_FLASH_CUDA_ARCHS": archs,
    }
    for command in (
        ["cmake", "-S", EMULATOR, "-B", folder, *(f"-D{k}={v}" for k, v in defines.items())],
        ["cmake", "--build", folder, "--parallel", str(parallel)],
    ):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return EMULATED


def open_library(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--emulated", action="store_true", required=True, help="for the host emulator")
    parser.add_argument("--head-dims", default="", help="JAX_FLASH_HEAD_DIMS of the build; default all")
    parser.add_argument("--archs", default="90a-real", help="JAX_FLASH_CUDA_ARCHS of the build")
    parser.add_argument("--parallel", type=int, default=2, help="jobs of the build; default 2")
    options = parser.parse_args()
    print(build_emulated(options.head_dims, options.archs, options.parallel))


if __name__ == "__main__":
    main()
