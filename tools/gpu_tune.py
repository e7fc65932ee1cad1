"""Times candidates for rows of csrc/kernels.def on this GPU: one library per candidate, built side by side.

    python3 tools/gpu_tune.py                 all candidates below
    python3 tools/gpu_tune.py backward 128    those of a pass and a head dim
    python3 tools/gpu_tune.py --build-only    needs no GPU

A candidate is M, N, stages, warps, blocks. bfloat16, 16,384 tokens, heads × d = 2048; TFLOP/s.
"""

from __future__ import annotations

import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import cuda_call  # noqa: E402
import gpu_timing  # noqa: E402

Row = tuple[int, int, int, int, int]
CANDIDATES: dict[tuple[str, int], list[Row]] = {
    ("forward", 64): [
        (128, 64, 2, 4, 1),
        (128, 64, 2, 4, 2),
        (128, 128, 1, 4, 1),
        (128, 64, 1, 4, 3),
        (128, 128, 1, 8, 1),
    ],
    ("forward", 128): [
        (128, 64, 1, 4, 1),
        (128, 32, 2, 4, 1),
        (128, 64, 2, 8, 1),
        (128, 128, 1, 8, 1),
        (64, 64, 1, 4, 3),
    ],
    ("forward", 256): [(128, 64, 1, 8, 1), (64, 64, 1, 4, 1), (128, 32, 1, 8, 1), (64, 32, 1, 4, 2)],
    ("backward", 64): [(128, 128, 2, 8, 1), (64, 128, 2, 8, 1), (64, 64, 2, 4, 2)],
    ("backward", 128): [(64, 128, 2, 8, 1), (64, 64, 1, 4, 2), (32, 128, 2, 8, 1)],
    ("backward", 256): [(64, 64, 2, 8, 1), (64, 64, 1, 8, 1), (32, 64, 2, 8, 1)],
}


def main() -> int:
    wanted = [x for x in sys.argv[1:] if not x.startswith("-")]
    chosen = [
        (pass_, d, row)
        for (pass_, d), rows in CANDIDATES.items()
        if all(x in (pass_, str(d)) for x in wanted)
        for row in rows
    ]
    with ThreadPoolExecutor(8) as pool:
        libraries = list(pool.map(lambda x: build(*x), chosen))
    if "--build-only" in sys.argv:
        return 0
    print(f"matmul 8192: {gpu_timing.matmul():.0f} TFLOP/s", flush=True)
    for (pass_, d, row), (library, spills) in zip(chosen, libraries, strict=True):
        name = f"{pass_} d {d} {','.join(map(str, row))}"
        if library is None:
            print(f"{name}: not built: {spills}", flush=True)
            continue
        cuda_call.register(library, "CUDA", name)
        figures = [
            gpu_timing.rate(pass_, d, s, causal, name) for s in (1024, 4096) for causal in (False, True)
        ]
        print(f"{name}: {' '.join(f'{x:.0f}' for x in figures)} (spills {spills})", flush=True)
    return 0


def build(pass_: str, d: int, row: Row) -> tuple[Path | None, str]:
    """The library whose only row of this pass and head dim is the candidate, and the bytes that it spills."""
    folder = ROOT / "build" / "tune" / f"{pass_}_{d}_{'_'.join(map(str, row))}"
    folder.mkdir(parents=True, exist_ok=True)
    rows = (ROOT / "csrc" / "kernels.def").read_text().splitlines()
    others = [
        x for x in rows if x.startswith("JF_KERNEL") and not re.search(rf", {pass_}, +half, +{d}, +{d},", x)
    ]
    table = folder / "kernels.def"
    table.write_text(
        "\n".join([*others, f"JF_KERNEL(sm80, {pass_}, half, {d}, {d}, {', '.join(map(str, row))})", ""])
    )
    defines = {"JAX_FLASH_KERNELS": table, "JAX_FLASH_HEAD_DIMS": d, "JAX_FLASH_DTYPES": "bfloat16"}
    try:
        library = cuda_call.build("90a-real", folder, defines, parallel=max(2, (os.cpu_count() or 2) // 8))
    except cuda_call.BuildError as error:
        return None, str(error).splitlines()[0]
    found = [count for kernel, count in cuda_call.spills(library).items() if kernel.startswith(pass_)]
    return library, "/".join(map(str, found))


if __name__ == "__main__":
    sys.exit(main())
