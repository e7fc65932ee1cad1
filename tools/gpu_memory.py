"""Runs tests/kernels/units, then the drivers of tests/kernels/guards until they have reached every CUDA kernel.

    python3 tools/gpu_memory.py [units bands memcheck initcheck synccheck racecheck]

bands: every operand lies between bands of NaN, which must be unchanged afterwards; two threads make the calls on two
streams. The last four are compute-sanitizer's tools, with each operand in an allocation of its own. racecheck believes
that an arrival at a barrier orders only the arriving thread's own accesses. So it has a build of its own, in which
every lane of a warp arrives; otherwise the first lane arrives for all. Needs a GPU, cmake, nvcc and jax's headers.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cuda_library

GUARDS = {
    "bands": "bands",
    "memcheck": "none",
    "synccheck": "none",
    "racecheck": "race",
    "initcheck": "fresh",
}
EVERY_LANE = "every-lane"  # racecheck's build, in a folder of the other build
CHECKS = ("units", *GUARDS)
SANITIZER = ("compute-sanitizer", "--print-limit", "20", "--error-exitcode", "9", "--tool")
# Every fourth call targets no kernel, and every third call of the driver `paged` is append_kv's.
CALLS_PER_KERNEL = {"dense": 4 / 3, "paged": 2}


@dataclass(frozen=True)
class Slice:
    """Some of the calls of a driver under one guard."""

    check: str
    driver: str
    first: int
    count: int

    def run(self, folder: Path) -> str:
        """The driver's output; raises if it found a fault."""
        command = [str(folder / f"memory_{self.driver}_cuda"), str(self.count), str(self.first)]
        if self.check != "bands":
            command = [*SANITIZER, self.check, *command]
        environment = os.environ | {"JAX_FLASH_GUARD": GUARDS[self.check]}
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        name = f"{self.check}_{self.driver}_{self.first}.log"
        (folder / name).write_text(done.stdout)
        if done.returncode:
            found = "\n".join(line for line in done.stdout.splitlines() if line.startswith("====="))
            raise RuntimeError(
                f"{folder / name}: exit status {done.returncode}\n{found[:8000]}\n{done.stdout[-3000:]}"
            )
        return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checks", nargs="*", metavar="check", help=f"of {', '.join(CHECKS)}; none given: all")
    parser.add_argument("--archs", default="90a-real", help="JAX_FLASH_CUDA_ARCHS of the build")
    parser.add_argument("--folder", type=Path, default=cuda_library.ROOT / "build" / "gpu-memory")
    parser.add_argument(
        "--built",
        action="store_true",
        help=f"the drivers are there already, racecheck's in FOLDER/{EVERY_LANE}",
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="on the GPU at once")
    options = parser.parse_args()
    checks = options.checks or CHECKS
    unknown = set(checks) - set(CHECKS)
    if unknown:
        parser.error(f"check: got {', '.join(sorted(unknown))}; there are {', '.join(CHECKS)}")
    folders = {check: options.folder / (EVERY_LANE if check == "racecheck" else "") for check in checks}
    for folder in () if options.built else dict.fromkeys(folders.values()):
        every_lane = "ON" if folder.name == EVERY_LANE else "OFF"
        defines = {"JAX_FLASH_MEMORY_DRIVERS": "ON", "JAX_FLASH_EVERY_LANE": every_lane}
        cuda_library.build(options.archs, folder, defines)
    kernels = {driver: count_kernels(folders[checks[0]], driver) for driver in CALLS_PER_KERNEL}
    failed = [
        not (run_units(folder) if check == "units" else run(check, kernels, folder, options.processes))
        for check, folder in folders.items()
    ]
    print(f"{sum(failed)} of {len(failed)} checks failed" if any(failed) else "all passed")
    return int(any(failed))


def count_kernels(folder: Path, driver: str) -> int:
    """The number of kernels that the driver has to reach."""
    printed = Slice("bands", driver, 1, 1).run(folder)
    return int(re.search(r"of the (\d+) kernels", printed)[1])  # type: ignore[index]


def run_units(folder: Path) -> bool:
    """Whether every wrapper and layout passes its tests."""
    right = True
    for program in ("cuda_units", "hopper_units"):  # the second exists if sm_90a is built
        if not (folder / program).exists():
            continue
        done = subprocess.run([folder / program], capture_output=True, text=True)
        wrong = [line for line in done.stdout.splitlines() if "FAILED" in line]
        counts = f"{done.stdout.count(': ok')} right, {len(wrong)} FAILED"
        print(f"{program}: {counts}", *wrong, done.stderr, sep="\n", end="")
        right &= done.returncode == 0
    return right


def run(check: str, kernels: dict[str, int], folder: Path, processes: int) -> bool:
    """Whether the calls that target each kernel, divided among processes, find no fault."""
    slices = []
    for driver, count in kernels.items():
        calls = int(count * CALLS_PER_KERNEL[driver]) + 2
        share = -(-calls * len(kernels) // processes)
        slices += [Slice(check, driver, first, share) for first in range(0, calls, share)]
    began = time.time()
    with ThreadPoolExecutor(processes) as pool:
        found = [error for error in pool.map(lambda one: attempt(one, folder), slices) if error]
    calls = sum(one.count for one in slices)
    print(f"{check}: {sum(kernels.values())} kernels, {calls} calls, {len(slices)} processes, "
          f"{time.time() - began:.0f} s: {f'{len(found)} FAILED' if found else 'no finding'}", flush=True)  # fmt: skip
    for error in found:
        print(error, flush=True)
    return not found


def attempt(one: Slice, folder: Path) -> str | None:
    """The error of one slice of calls, or None."""
    try:
        one.run(folder)
    except RuntimeError as error:
        return str(error)
    return None


if __name__ == "__main__":
    sys.exit(main())
