"""What ptxas says of every kernel: registers, spills, shared memory; and the build's failure when one spills, or
when its wgmma run one by one.

    resources.py compile OBJECT -- nvcc -Xptxas=-v ...   runs the compiler and keeps what it says, in OBJECT.ptxas
    resources.py list TABLE OBJECT...                     writes the table of the kernels
    resources.py check TABLE OBJECT...                    the same, and fails where one passes its BUDGET or is slowed

cmake/kernels.cmake calls both; the table lies beside the library, as cuda_resources.tsv.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

SCORES = Path(__file__).resolve().parent.parent / "csrc" / "scores.def"
KINDS = re.findall(r"^JF_SCORE\(\w+, *(\w+)", SCORES.read_text(), re.MULTILINE)  # by ScoreKind's value

# Bytes that a kernel may spill, by the first pattern that its arch and name match: none in the kernels without
# bias, masks and the like of the common rows, 16-bit with d and dv of 32, 64, 128 or 256; next to none of these on
# cards newer than those that the rows were chosen on, and few in the tangent pass, which uses every register.
_ROWS = r"(__half|__nv_bfloat16), Row\{\(Pass\)\d+, \(Design\)\d+, \d+u, \d+u, (32, 32|64, 64|128, 128|256, 256), "
_COMMON = (
    rf"((forward_sm[89]0<ForwardSm[89]0|(backward|tangent)_\w+<(Backward|Tangent)\w+)<{_ROWS}.*, plain\b"
    r"(?!, PagedState)"  # over dense rows alone
    rf"|backward_sm90<BackwardSm90<{_ROWS}.*, plain\b)"
)
BUDGET: tuple[tuple[str, int], ...] = (
    (rf"^sm_1\d\d\w? tangent_\w+<TangentSm80<{_ROWS}.*, plain\b", 128),
    (rf"^sm_1\d\d\w? {_COMMON}", 8),
    (rf"^\w+ backward_sm90<BackwardSm90<{_ROWS}.*, segments\b", 16),  # four scalars
    (rf"^\w+ backward_sm90<BackwardSm90<{_ROWS}.*, blocks\b", 4),  # one element of P, at d128
    (rf"^\w+ forward_sm90<ForwardSm90<{_ROWS}.*, ranges\b", 32),  # outside of the loops, at d256
    (rf"^\w+ (forward|backward_cluster)_sm90<\w+<{_ROWS}.*, blocks\b", 0),
    (rf"^\w+ backward_sm90<BackwardSm90<{_ROWS}.*, listed_mask\b", 24),  # scalars
    (rf"^\w+ forward_sm90<ForwardSm90<{_ROWS}128, 64, 3, 20, 2, .*, listed_mask\b", 68),  # scalars of two teams
    (rf"^\w+ (forward|backward_cluster)_sm90<\w+<{_ROWS}.*, listed_mask\b", 0),
    (r"^\w+ backward_cluster_sm90<.*, 512, 512, .*\}, segments\b", 16),  # four scalars
    (r"^\w+ backward_cluster_sm90<.*, 512, 512, .*\}, (alibi|dropout)\b", 8),  # one scalar and two
    (r"^\w+ backward_cluster_sm90<.*, 512, 512, .*\}, (?!general)\w+", 0),
    (rf"^\w+ {_COMMON}", 0),
    (r"^\w+ forward_sm90<ForwardSm90<.*, 512, 512, 128, .*, (plain|segments|softcap)\b", 0),
    ("", 1 << 30),
)


class Kernel(NamedTuple):
    name: str
    arch: str
    registers: int
    stack: int
    spills: int  # bytes stored
    shared: int  # bytes, without what the launch adds

    def row(self) -> str:
        return "\t".join(
            map(str, (self.arch, self.registers, self.stack, self.spills, self.shared, self.name))
        )


HEADER = "arch\tregisters\tstack\tspills\tshared\tkernel"


def parse(log: str) -> list[Kernel]:
    """The kernels in what `ptxas -v` says. Device functions that are called, not inlined, count as none."""
    found = []
    for part in re.split(r"ptxas info\s*: Compiling entry function ", log)[1:]:
        name, arch = re.match(r"'([^']+)' for '([^']+)'", part).groups()
        stack, spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", part).groups()
        used = re.search(r"Used (\d+) registers[^\n]*", part)
        shared = re.search(r"(\d+) bytes smem", used.group())
        found.append(
            Kernel(
                name, arch, int(used.group(1)), int(stack), int(spills), int(shared.group(1)) if shared else 0
            )
        )
    return found


def slowed(log: str) -> list[str]:
    """What ptxas says where it runs wgmma one by one (C7510 and the next), or ignores setmaxnreg (C7508)."""
    return re.findall(r"\((C75(?:08|1[0-8])\)[^\n]*)", log)


def demangled(kernels: list[Kernel]) -> list[Kernel]:
    """With readable names, less the parameters: `segments` is written for `(ScoreKind)4`."""
    names = "\n".join(kernel.name for kernel in kernels)
    answer = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True).stdout
    short = [
        re.sub(r"^void |\(jax_flash::Problem.*$|jax_flash::|\bsm80::", "", name)
        for name in answer.splitlines()
    ]
    short = [re.sub(r"\(ScoreKind\)(\d+)", lambda found: KINDS[int(found[1])], name) for name in short]
    return [kernel._replace(name=name) for kernel, name in zip(kernels, short, strict=True)]


def budget(kernel: Kernel) -> int:
    return next(n for pattern, n in BUDGET if re.search(pattern, f"{kernel.arch} {kernel.name}"))


def over_budget(kernels: list[Kernel]) -> list[str]:
    return [
        f"{kernel.name} for {kernel.arch} spills {kernel.spills} bytes, more than the {allowed} of its budget"
        for kernel in kernels
        if kernel.spills > (allowed := budget(kernel))
    ]


def compile_(target: Path, command: list[str]) -> int:
    """ptxas' report goes to its file, all else that the compiler says where it went before."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    report = r"ptxas info|\d+ bytes stack frame"
    sys.stdout.write("".join(x for x in done.stdout.splitlines(True) if not re.search(report, x)))
    target.with_name(target.name + ".ptxas").write_text(done.stdout)
    if done.returncode == 0 and exits(target):
        target.unlink()
        print(f"{target.name}: a host function calls a __device__ function, which nvcc makes exit(1)")
        return 1
    return done.returncode


def exits(target: Path) -> bool:
    """Whether an object refers to exit(): no file of kernels does, but nvcc puts this call, without a warning, where a
    host template calls a function that is for the device alone."""
    listed = subprocess.run(["nm", "-u", target], capture_output=True, text=True, check=True)
    return "exit" in listed.stdout.split()


def report(mode: str, table: Path, objects: list[Path]) -> int:
    files = [x.with_name(x.name + ".ptxas") for x in objects]
    logs = [x.read_text() for x in files if x.exists()]
    kernels = demangled([kernel for log in logs for kernel in parse(log)])
    errors = over_budget(kernels) + [x for log in logs for x in slowed(log)] if mode == "check" else []
    if errors:
        print(*errors, "JAX_FLASH_BUDGET=OFF builds it all the same", sep="\n", file=sys.stderr)
    else:  # the table is what the build makes, which has failed otherwise
        table.write_text("\n".join([HEADER, *sorted(kernel.row() for kernel in kernels), ""]))
    return int(bool(errors))


def main(arguments: list[str]) -> int:
    mode, path, *rest = arguments
    if mode == "compile":
        return compile_(Path(path), rest[1:])
    return report(mode, Path(path), [Path(x) for x in rest])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
