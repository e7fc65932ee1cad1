"""A kernel family joins the plan by its rows in csrc/kernels.def and one file in csrc/core/families. No GPU needed.

The table is the real one plus rows for families that exist only in tests/kernels/families/next.cc.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "csrc" / "core"
FORWARD, BACKWARD = 0, 1
FIXED, VARLEN, PAGED = 0, 1, 2
MASK = 1 << 6
HEAD_DIMS = ((32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))

NEW_ROWS = "\n".join(
    [
        "JF_ARCH(sm199, imagined, 190, 199, 199a, 256)",
        *(
            f"JF_KERNEL(sm90, backward, tiles, dense, half, {d}, {dv}, 64, 128, 2, 12, 1, 1, 1, "
            "plain | general_dropout)"
            for d, dv in HEAD_DIMS
        ),
        "JF_KERNEL(sm90, decode, split_keys, runtime, half, 128, 128, 16, 64, 4, 8, 1, 1, 1, plain | general)",
        "JF_KERNEL(sm199, forward, tiles, dense, half, 128, 128, 128, 128, 2, 16, 1, 2, 1, plain | general)",
        "JF_KERNEL(sm199, forward, tiles, dense, half, 128, 128, 256, 128, 2, 16, 1, 2, 1, plain)",
    ]
)


@pytest.fixture(scope="module")
def planner(tmp_path_factory):
    """The plan, compiled with that table and that file into a program."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or not CORE.exists():
        pytest.skip("needs a C++ compiler and the sources")
    folder = tmp_path_factory.mktemp("families")
    table = (ROOT / "csrc" / "kernels.def").read_text()
    moved, count = re.subn(r"JF_ARCH\(sm90, +hopper,", "JF_ARCH(sm90, next_hopper,", table)
    assert count == 1
    moved = re.sub(r"JF_KERNEL\(sm90, +(backward|decode), .*\n", "", moved)  # the new rows take their place
    (folder / "kernels.def").write_text(moved + NEW_ROWS + "\n")
    sources = [path for part in (".", "plan", "families") for path in sorted((CORE / part).glob("*.cc"))]
    sources += sorted((ROOT / "tests" / "kernels" / "families").glob("*.cc"))
    program = folder / "planner"
    options = ["-std=c++20", "-O0", "-Wall", "-Wextra", "-Werror", "-I", folder, "-I", ROOT / "csrc"]
    subprocess.run([compiler, *options, *sources, "-o", program], check=True)
    return program


def plans(planner: Path, *calls: dict[str, int]) -> list[str]:
    lines = "".join(" ".join(f"{name}={value}" for name, value in call.items()) + "\n" for call in calls)
    done = subprocess.run([planner], input=lines, text=True, capture_output=True, check=True)
    return done.stdout.splitlines()


def test_new_rows_of_an_arch_are_chosen(planner):
    calls = [{"pass": BACKWARD, "d": d, "dv": dv} for d, dv in HEAD_DIMS]
    for (d, dv), text in zip(HEAD_DIMS, plans(planner, *calls), strict=True):
        assert text.startswith(f"sm90 backward dense plain d={d} dv={dv} tile 64x128 ")
    (decode,) = plans(
        planner, {"q_rows": 1, "heads": 64, "layout": PAGED, "page_size": 16, "operands": 1 << 11}
    )
    assert decode.startswith(
        "sm90 decode dense|paged plain d=128 dv=128 tile 16x64, decode splits 8 columns over 132"
    )


def test_what_their_traits_refuse_runs_the_older_rows(planner):
    texts = plans(
        planner,
        {"pass": BACKWARD, "leading": 6, "leading_rank": 2},
        {"pass": BACKWARD, "operands": MASK},
        {"pass": BACKWARD, "dtype": 2},  # float32 has no such row
        {"pass": BACKWARD, "shared_memory": 90_000},
        {"pass": BACKWARD, "capability": 100},
        {"q_rows": 1, "heads": 64, "layout": PAGED, "page_size": 8, "operands": 1 << 11},
    )
    assert [text.split()[0] for text in texts] == ["sm80"] * 6


def test_their_traits_plan_grid_workspace_and_shared_memory(planner):
    text, packed = plans(
        planner, {"pass": BACKWARD, "k_rows": 1500}, {"pass": BACKWARD, "layout": VARLEN, "operands": 3}
    )
    sums = 4 * 2 * 1024 * 8 * 128  # of dQ, in whole query tiles
    assert f"on 132 persistent CTAs, {12 * 8 * 2} key tiles" in text
    assert f"{2 * (2 * 64 * 2 + 128) * 128 + 2048} bytes of shared memory" in text
    assert f"{sums} bytes of workspace, bound {sums}" in text
    used, bound = map(int, re.search(r"(\d+) bytes of workspace, bound (\d+)", packed).groups())
    assert sums // 2 < used <= bound


def test_a_new_arch_runs_on_its_devices_alone(planner):
    imagined = {"capability": 199, "q_rows": 4096, "k_rows": 4096}
    new, general, packed, wide, hopper, newer = plans(
        planner,
        imagined,
        imagined | {"operands": MASK},
        imagined | {"layout": VARLEN, "operands": 3},
        imagined | {"d": 256},
        imagined | {"capability": 90},
        imagined | {"capability": 200},
    )
    assert new.startswith("sm199 forward dense plain d=128 dv=128 tile 256x128, ")
    assert "in 2-CTA clusters, 200000 bytes of shared memory" in new
    assert general.startswith("sm199 forward dense general d=128 dv=128 tile 128x128")
    assert [text.split()[0] for text in (packed, wide, hopper, newer)] == ["sm80", "sm80", "sm90", "sm80"]
