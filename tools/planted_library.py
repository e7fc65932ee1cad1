"""A CUDA library with a planted bug. Only what the bug changes is compiled again; the rest is the library without
it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import cuda_library

EMULATOR = "tests/kernels/emulator"
NAME = "libjax_flash_cuda.so"
ROW = re.compile(r"JF_KERNEL\((.*)\)")
SCORES = (Path(__file__).resolve().parents[1] / "csrc" / "scores.def").read_text()
# Words that stand for several kinds of scores.
SEVERAL = {
    name: set(kinds.split(" | "))
    for name, kinds in re.findall(r"^JF_SCORES\((\w+), (.*)\)$", SCORES, re.MULTILINE)
}


def table(lines: list[str], rows: tuple[str, ...]) -> list[str]:
    """The architectures of csrc/kernels.def, append's rows, and these rows, each with some of its scores.

    A row is named by its first columns but the design and the element: "sm90 forward dense 64 64: plain | segments" is
    the first one of these with those scores.
    """
    chosen: dict[int, str] = {}
    for row in rows:
        name, scores = (x.strip() for x in row.split(":"))
        wanted = {x.strip() for x in scores.split("|")}
        for i, line in enumerate(lines):
            columns = [x.strip() for x in match[1].split(",")] if (match := ROW.match(line)) else []
            kinds = {x.strip() for x in columns[-1].split("|")} if columns else set()
            for word in kinds & SEVERAL.keys():
                kinds |= SEVERAL[word]
            if wanted <= kinds and " ".join(columns[:2] + columns[3:4] + columns[5:]).startswith(f"{name} "):
                chosen[i] = f"JF_KERNEL({', '.join([*columns[:-1], scores])})"
                break
        else:
            raise ValueError(f"csrc/kernels.def has no row {row}")
    always = re.compile(r"JF_ARCH\(|JF_KERNEL\(\w+, +append,")
    return [chosen.get(i, x) for i, x in enumerate(lines) if i in chosen or always.match(x)]


@dataclass(frozen=True)
class Library:
    """The library of the tree `root`, in a build folder of Ninja's, and the path that tests load it from."""

    root: Path
    folder: Path
    place: Path
    workers: int = 2

    def build(self, runs: str, rows: tuple[str, ...]) -> None:
        """Builds the library without a bug: for the emulator the rows of head dims 64, 512 and 576, for a GPU these of
        bfloat16."""
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = {"Python_EXECUTABLE": sys.executable, "JAX_FLASH_HEAD_DIMS": "64;512;576/512"}
        settings |= {"JAX_FLASH_CUDA_ARCHS": "90-real"}
        source = self.root / EMULATOR
        if runs == "gpu":
            kernels = self.folder / "some.def"
            lines = table((self.root / "csrc" / "kernels.def").read_text().splitlines(), rows)
            kernels.write_text("".join(f"{line}\n" for line in lines))
            settings |= {"JAX_FLASH_KERNELS": str(kernels), "JAX_FLASH_HEAD_DIMS": ""}
            settings |= {"JAX_FLASH_CUDA_ARCHS": "90a-real", "JAX_FLASH_DTYPES": "bfloat16"}
            settings |= {"JAX_FLASH_MODULE": "OFF", "JAX_FLASH_CUDA": "ON", "JAX_FLASH_BUDGET": "OFF"}
            source = self.root
        _run(
            "cmake",
            "-S",
            source,
            "-B",
            self.folder,
            "-G",
            "Ninja",
            *(f"-D{k}={v}" for k, v in settings.items()),
        )
        _run("cmake", "--build", self.folder, "--parallel", self.workers, "--target", NAME)
        self.restore()

    def restore(self) -> None:
        """Makes tests load the library without a bug."""
        self.place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.folder / NAME, self.place)

    def plant(self, file: str, text: str, objects: tuple[str, ...], to: Path) -> Path:
        """Builds, in the folder `to`, the library with `text` in place of a file of csrc.

        Of the kernels, only those in objects whose name contains one of `objects` get the bug; without any, all do.
        """
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(self.root / "csrc", to / "csrc")
        (to / file).write_text(text)
        jobs = {
            x["output"]: x["command"] for x in json.loads(_run("ninja", "-C", self.folder, "-t", "compdb"))
        }
        changed = [x for x in self._depending_on(file) if _wanted(x, objects)]
        if not changed:
            raise cuda_library.BuildError(f"nothing that is built depends on {file}")
        link = jobs[NAME].replace(f"-o {NAME} ", f"-o {to / NAME} ")
        for i, output in enumerate(changed):
            new = str(to / f"{i}.o")
            # Without -Werror, because a bug may leave names unused.
            command = jobs[output].replace(output, new).replace(" -Werror ", " ")
            for source in (f"{self.root}/{EMULATOR}/../../../csrc", f"{self.root}/csrc"):
                command = command.replace(source, f"{to}/csrc")
            _run("bash", "-c", command, folder=self.folder)
            link = link.replace(f" {output} ", f" {new} ")
        _run("bash", "-c", link, folder=self.folder)
        return to / NAME

    def _depending_on(self, file: str) -> list[str]:
        """The library's objects that include a file, or are made of it."""
        found, output = [], ""
        for line in _run("ninja", "-C", self.folder, "-t", "deps").splitlines():
            if line and not line.startswith(" "):
                output = line.partition(":")[0]
            elif os.path.normpath(self.folder / line.strip()) == str(self.root / file) and output.startswith(
                "CMakeFiles/jax_flash_cuda"
            ):
                found.append(output)
        return found


def _wanted(output: str, objects: tuple[str, ...]) -> bool:
    return "/kernels/" not in output or not objects or any(x in output for x in objects)


def _run(*command: object, folder: Path | None = None) -> str:
    """What a command prints; raises BuildError with what the compiler said."""
    done = subprocess.run([str(x) for x in command], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stdout + done.stderr
        errors = [line for line in said.splitlines() if re.search("error|cannot find|undefined", line, re.I)]
        raise cuda_library.BuildError("\n".join(errors[:5]) or said[-2000:])
    return done.stdout
