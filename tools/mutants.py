"""Plants the bugs of tests/mutants one at a time in a copy of the tree, and reports which of them the tests catch.

python tools/mutants.py [--only TEXT]... [--nearest] [--gpu] [--list] [--jobs N]

A bug is a mutant: a file, a piece of its text and the replacement. For each mutant this builds what depends on the file
and runs the tests nearest to it, then the other tests until one fails. The exit status is 1 if a mutant survives or its
text is no longer in the file. With --jobs N mutants run at a time, each in a copy of the tree. --built takes
build/mutants as another machine left it, so that only mutants of CUDA kernels or of Python can run.
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import cuda_library
import planted_library
from mutant_lists import ROOT, Mutant, gpu_rows, load, rows_for, stale

WORK = ROOT / "build" / "mutants"
ISA_OF_FLAG = {"avx512_bf16": "avx512_bf16", "avx512bw": "avx512", "avx2": "avx2"}
# With an editable install, `import jax_flash` would otherwise import the user's tree.
SITE = """import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
"""


class Broken(Exception):
    """The tree without a bug fails its tests, or the tree with the bug does not compile, so there is no verdict."""


# --- where a mutant runs ------------------------------------------------------------------------------------------

# The emulator's library has kernels for the head dims 64, 512 and 576 only, which also run smaller ones by padding.
EMULATED_REST = (
    *("tests/test_several_tiles.py", "tests/test_append.py", "tests/test_paged_gradients.py"),
    *("-k", "not (xla or d72 or d96 or d128 or d160 or d192 or d224 or d256)"),
)
REST = {"cpu": ("tests",), "emulated": EMULATED_REST, "gpu": ("tests",), "guards": ()}


def machine_isa() -> str:
    """The best instruction set of the CPU kernels that this machine has; only its kernels are built."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return next((isa for flag, isa in ISA_OF_FLAG.items() if flag in flags), "baseline")


def why_not(runs: str, gpu: bool) -> str | None:
    """Why mutants of this kind cannot run here."""
    if runs == "gpu" and not gpu:
        return "of a GPU (GPU=1 runs them)"
    if runs == "gpu" and not (shutil.which("nvidia-smi") and shutil.which("nvcc")):
        return "of a GPU, and there is none, or no nvcc"
    if runs != "guards" and not (shutil.which("cmake") and shutil.which("ninja")):
        return "to be built, and cmake or ninja is missing"
    return None


def tree_files() -> set[str]:
    """The files of the tree that are not made by a build."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-coz", "--exclude-standard"]
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return {name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()}
    made = {"build", "dist", "out", "__pycache__", ".git", ".pytest_cache", ".mypy_cache", ".ruff_cache"}
    paths = (x.relative_to(ROOT) for x in ROOT.rglob("*") if x.is_file() and x.suffix != ".so")
    return {str(x) for x in paths if not made & set(x.parts) and not x.parts[0].startswith(".venv")}


@dataclass
class Copy:
    """A copy of the tree, with what is built of it. Nothing outside build/mutants is ever written.

    `given`: another machine has built what mutants of CUDA kernels need. `base`: the copy whose CUDA libraries this one
    shares.
    """

    workers: int
    gpu_rows: tuple[str, ...] = ()  # rows of the library for a GPU
    root: Path = WORK / "tree"
    built: str = ""  # the kind and instruction set of the last build; "" if files have changed since
    given: bool = False
    base: Copy | None = None

    def sync(self) -> None:
        """Copies the tree's changed files; unchanged ones keep their time stamps, so that little is rebuilt."""
        names = tree_files()
        known = self.root.with_suffix(".txt")
        for name in set(known.read_text().splitlines() if known.exists() else ()) - names:
            (self.root / name).unlink(missing_ok=True)
        for name in names:
            source, copy = ROOT / name, self.root / name
            if not copy.exists() or copy.read_bytes() != source.read_bytes():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, copy)
                copy.chmod(source.stat().st_mode)
        known.write_text("\n".join(sorted(names)))
        (WORK / "site").mkdir(exist_ok=True)
        (WORK / "site" / "sitecustomize.py").write_text(SITE)

    def another(self, number: int) -> Copy:
        """A copy in which a mutant can run at the same time as those in other copies."""
        copy = Copy(self.workers, self.gpu_rows, WORK / f"tree{number}", "cpu ", self.given, self)
        copy.sync()
        for module in (self.root / "jax_flash").glob("_core*.so"):
            shutil.copyfile(module, copy.root / "jax_flash" / module.name)
        return copy

    def write(self, name: str, text: str) -> None:
        (self.root / name).write_text(text)
        if not name.startswith(("jax_flash/", "tests/test_")):
            self.built = ""

    def environment(self, runs: str, isa: str) -> dict[str, str]:
        path = [
            WORK / "site",
            *([self.root / "tools", self.root / "tests/kernels/emulator"] * (runs == "emulated")),
        ]
        named = {"PYTHON": sys.executable, "JOBS": str(self.workers), "PYTHONPATH": ":".join(map(str, path))}
        named |= {"JAX_FLASH_WERROR": "OFF", "JAX_FLASH_CPU_ISAS": isa or machine_isa()}
        named |= {"JAX_FLASH_CUDA": "OFF", "PYTHONDONTWRITEBYTECODE": "1"}
        if runs == "gpu":
            named |= {"JAX_FLASH_TEST_IMPLEMENTATION": "cuda"}
        return {**os.environ, **named, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def build(self, runs: str, isa: str) -> None:
        """Builds what tests of this kind need; raises Broken with the compiler's message."""
        kind = f"{runs} {isa}"
        if self.built == kind or (self.base and runs in ("emulated", "gpu")):
            return
        if self.given:
            if runs in ("emulated", "gpu"):
                self.library(runs).restore()
            return
        env = self.environment(runs, isa)
        commands: list[list[Any]] = [["tools/build_inplace.sh"]]
        if runs == "guards":
            one = f"ISAS={isa or machine_isa()}"
            targets = [f"../../../build/memory/{driver}" for driver in ("dense", "paged")]
            commands = [["make", "-C", "tests/kernels/guards", "-j", self.workers, one, *targets]]
        self.built = ""
        for command in commands:
            done = subprocess.run(
                list(map(str, command)), cwd=self.root, env=env, capture_output=True, text=True, check=False
            )
            if done.returncode:
                said = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line.lower()]
                raise Broken("\n".join(said[:5]) or (done.stdout + done.stderr)[-2000:])
        if runs in ("emulated", "gpu"):
            self.library(runs).build(runs, self.gpu_rows)
        self.built = kind

    def library(self, runs: str) -> planted_library.Library:
        """The CUDA library that tests of this kind load."""
        places = {"emulated": "build/emulated", "gpu": "jax_flash"}  # the emulator plugin, and the package
        place = self.root / places[runs] / planted_library.NAME
        root = self.base.root if self.base else self.root
        return planted_library.Library(root, root / "build" / f"planted-{runs}", place, self.workers)

    def check_import(self) -> None:
        """Raises Broken unless the tests import the copy's jax_flash."""
        program = "import jax_flash._core as core; print(core.__file__)"
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=self.root,
            env=self.environment("cpu", ""),
            capture_output=True,
            text=True,
        )
        if not done.stdout.startswith(str(self.root)):
            raise Broken(f"the copy's tests would import {done.stdout or done.stderr}")


# --- running tests ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    failed: bool
    by: str  # the test that failed first
    said: str


def run_tests(
    copy: Copy, runs: str, isa: str, tests: tuple[str, ...], seconds: float, workers: int = 0
) -> Outcome:
    """Runs tests until one fails; raises Broken if none begins."""
    if runs == "guards":
        (driver,) = tests
        command = [copy.root / "build/memory" / driver, "1500"]
    else:
        command = [sys.executable, "-m", "pytest", "-x", "-v", "-p", "no:cacheprovider", "--color=no"]
        command += ["-p", "emulated"] if runs == "emulated" else []
        command += ["-n", str(workers)] if workers else []
        command += tests
    process = subprocess.Popen(
        list(map(str, command)), cwd=copy.root, env=copy.environment(runs, isa), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        return Outcome(True, f"{last_begun(said)}, which does not end", said)
    if process.returncode == 0:
        return Outcome(False, "", said)
    failed = re.search(r"^(?:FAILED|ERROR) (.*)$", said, re.MULTILINE)  # with the first line of the reason
    if runs == "guards":
        return Outcome(True, f"{tests[0]} {(re.search('FAILED.*', said) or [''])[0]}", said)
    if not failed and last_begun(said) == NO_TEST:
        raise Broken(f"no test begins: {said[-200:]}")
    return Outcome(True, failed[1] if failed else f"{last_begun(said)}, which crashes", said)


NO_TEST = "no test"


def last_begun(said: str) -> str:
    begun = re.findall(r"^(tests/\S+::[^\n]*?)(?: (?:PASSED|SKIPPED|Fatal).*)?$", said, re.MULTILINE)
    return begun[-1].strip() if begun else NO_TEST


def passes_without(copy: Copy, mutants: list[Mutant]) -> dict[str, float]:
    """Runs the nearest tests of all mutants without any bug, and returns their seconds; raises Broken if one fails."""
    seconds = {}
    for runs in dict.fromkeys(x.runs for x in mutants):
        of_kind = [x for x in mutants if x.runs == runs]
        nearest = tuple(dict.fromkeys(test for x in of_kind for test in x.tests))
        copy.build(runs, "")
        begin = time.monotonic()
        for tests in [(test,) for test in nearest] if runs == "guards" else [nearest]:
            outcome = run_tests(copy, runs, "", tests, 3600, copy.workers)
            if outcome.failed:
                raise Broken(f"without a bug {outcome.by} fails:\n{outcome.said[-3000:]}")
            passed = "\n".join(line for line in outcome.said.splitlines() if "PASSED" in line)
            if skipped := [test for test in tests if runs != "guards" and test not in passed]:
                raise Broken(f"skipped, and so blind to every bug: {skipped[0]}")
        seconds[runs] = time.monotonic() - begin
    return seconds


def try_mutant(copy: Copy, mutant: Mutant, limit: float, nearest_only: bool) -> tuple[str, str]:
    """The verdict on a mutant, and the test that killed it or the promise that it breaks. Nearest tests that run for
    longer than `limit` seconds count as hanging."""
    file = copy.root / mutant.file
    whole = file.read_text()
    try:
        if mutant.runs in ("emulated", "gpu"):
            library = copy.library(mutant.runs)
            copy.build(mutant.runs, "")
            folder = copy.root.with_name(f"{copy.root.name}-planted")
            bad = library.plant(mutant.file, mutant.planted(whole), mutant.objects, folder)
            library.place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bad, library.place)
        else:
            copy.write(mutant.file, mutant.planted(whole))
            copy.build(mutant.runs, mutant.isa)
        outcome = run_tests(copy, mutant.runs, mutant.isa, mutant.tests, limit)
        if outcome.failed:
            return "killed", outcome.by
        if not nearest_only and REST[mutant.runs]:
            outcome = run_tests(copy, mutant.runs, mutant.isa, REST[mutant.runs], 7200, copy.workers)
            if outcome.failed:
                return "killed", f"{outcome.by}, far from it"
        return "SURVIVED", mutant.breaks
    except (Broken, cuda_library.BuildError) as error:
        return "BROKEN", f"no verdict: {error}"
    finally:
        if mutant.runs in ("emulated", "gpu"):
            library.restore()
        else:
            copy.write(mutant.file, whole)


@dataclass(frozen=True)
class Verdict:
    mutant: Mutant
    found: str
    by: str
    seconds: float


def try_all(
    copies: list[Copy], mutants: list[Mutant], limits: dict[str, float], nearest_only: bool
) -> Iterator[Verdict]:
    """The verdicts on mutants, of which one at a time runs in each copy, as they come."""
    free: queue.SimpleQueue[Copy] = queue.SimpleQueue()
    for copy in copies:
        free.put(copy)

    def verdict(mutant: Mutant) -> Verdict:
        copy, begin = free.get(), time.monotonic()
        try:
            found, by = try_mutant(copy, mutant, limits[mutant.runs], nearest_only)
        finally:
            free.put(copy)
        return Verdict(mutant, found, by, time.monotonic() - begin)

    with ThreadPoolExecutor(len(copies)) as pool:
        for done in as_completed([pool.submit(verdict, x) for x in mutants]):
            yield done.result()


def selected(only: list[str], gpu: bool) -> list[Mutant]:
    """The mutants whose name, list or file contains one of the texts and that can run here."""
    found = [x for x in load() if not only or any(text in f"{x.group}: {x.name} ({x.file})" for text in only)]
    for reason, count in Counter(filter(None, (why_not(x.runs, gpu) for x in found))).items():
        print(f"{count} mutants are {reason}")
    return [x for x in found if not why_not(x.runs, gpu)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", action="append", default=[], help="mutants whose name, list or file contains it"
    )
    parser.add_argument("--nearest", action="store_true", help="run the nearest tests only")
    parser.add_argument(
        "--trusting", action="store_true", help="do not try first whether the nearest tests pass"
    )
    parser.add_argument("--gpu", action="store_true", help="run also those of kernels that need a GPU")
    parser.add_argument(
        "--list", action="store_true", help="list them, and which no longer fit, without running any"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes of builds and tests; default 2")
    parser.add_argument("--jobs", type=int, default=1, help="mutants that are tried at a time; default 1")
    parser.add_argument("--built", action="store_true", help="build nothing but the mutants")
    parser.add_argument(
        "--limit", type=float, help="seconds of the nearest tests; default: by those without a bug"
    )
    options = parser.parse_args()
    mutants = load() if options.list else selected(options.only, options.gpu)
    counts: Counter[str] = Counter()
    for mutant, reason in stale(mutants):
        counts["STALE"] += 1
        print(f"STALE     {mutant.group}: {mutant.name}\n          {reason}")
        mutants.remove(mutant)
    if options.list:
        for x in mutants:
            print(f"{x.group}: {x.name} ({x.file})\n    breaks: {x.breaks}")
        return int(counts["STALE"] > 0)
    WORK.mkdir(parents=True, exist_ok=True)
    rows = rows_for([x for x in mutants if x.runs == "gpu"], gpu_rows())
    copy = Copy(options.workers, rows, given=options.built)
    print(f"{len(mutants)} mutants to try", flush=True)
    kinds = dict.fromkeys(x.runs for x in mutants)
    try:
        copy.sync()
        for runs in ("cpu", *kinds):
            copy.build(runs, "")
        copy.check_import()
        seconds = dict.fromkeys(kinds, 100.0) if options.trusting else passes_without(copy, mutants)
    except (Broken, cuda_library.BuildError) as error:
        print(error)
        return 2
    limits = {runs: options.limit or 120 + 5 * spent for runs, spent in seconds.items()}
    copies = [copy.another(i) for i in range(options.jobs)] if options.jobs > 1 else [copy]
    for x in try_all(copies, mutants, limits, options.nearest):
        counts[x.found] += 1
        print(f"{x.found:9} {x.seconds:5.0f} s  {x.mutant.group}: {x.mutant.name}\n{'':19}{x.by}", flush=True)
    print(", ".join(f"{count} {name.lower()}" for name, count in counts.items()))
    return int(set(counts) != {"killed"})


if __name__ == "__main__":
    sys.exit(main())
