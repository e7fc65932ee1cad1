"""Each planted bug of tests/mutants names its promise and existing tests, and one whose text is gone is reported.

That the tests catch them is shown by `make mutants`, which takes hours.
"""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tools" / "mutants.py"


@pytest.fixture(scope="module")
def tool():
    if not SCRIPT.exists():
        pytest.skip("the tools lie in the source tree only")
    spec = importlib.util.spec_from_file_location("mutants", SCRIPT)
    module = sys.modules["mutants"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lists(tool):
    return sys.modules["mutant_lists"]


def test_each_has_a_name_of_its_own_a_promise_and_tests_that_exist(tool, lists):
    found = tool.load()
    assert len({(x.group, x.name) for x in found}) == len(found) >= 60
    for x in found:
        assert x.breaks, x.name
        assert x.tests, x.name
        assert x.old != x.new, x.name
        assert x.runs in lists.RUNS, x.name
        for test in x.tests:
            if x.runs == "guards":
                assert (ROOT / "tests" / "kernels" / "guards" / f"{test}.cc").exists(), x.name
                continue
            file, _, function = test.partition("::")
            text = (ROOT / file).read_text()
            assert not function or f"def {function.partition('[')[0]}(" in text, f"{x.name}: no {test}"


def test_none_is_stale(tool):
    assert [f"{x.group}: {x.name}: {reason}" for x, reason in tool.stale(tool.load())] == []


def test_a_gpus_bugs_are_in_kernels_of_the_library_that_their_tests_load(tool):
    lines = (ROOT / "csrc" / "kernels.def").read_text().splitlines()
    table = tool.planted_library.table(lines, tool.gpu_rows())
    rows = [line.split("(")[1].replace(" ", "").split(",") for line in table if line.startswith("JF_KERNEL")]
    rows = [row for row in rows if row[1] != "append"]
    assert len(rows) == len(tool.gpu_rows())
    files = [f"{pass_}_{loader}_{arch}_d{d}" for arch, pass_, _, loader, _, d, *_ in rows]
    for x in tool.load():
        if x.runs == "gpu":
            assert x.objects, x.name
            assert all(any(part in file for file in files) for part in x.objects), x.name


def test_a_gpus_library_has_the_rows_of_the_head_dims_that_bugs_are_in(tool):
    rows = (
        "sm90 forward dense 64 64 192: plain",
        "sm90 backward dense 64 64: plain",
        "sm90 forward dense 96 96: plain",
    )
    bug = tool.Mutant("", "", "", "", "", (), "gpu", "", objects=("backward_dense_sm90_d64",))
    assert tool.rows_for([bug], rows) == rows[:2]
    assert tool.rows_for([dataclasses.replace(bug, objects=())], rows) == rows
    assert tool.rows_for([], rows) == ()


def test_a_row_that_the_table_lacks_is_told(tool):
    lines = [
        "JF_ARCH(sm90, hopper, 90, 99, 90a)",
        "JF_KERNEL(sm90, forward, tiles, dense, half, 64, 64, 192, 2, plain | each_option)",
    ]
    chosen = tool.planted_library.table(lines, ("sm90 forward dense 64 64: alibi",))
    assert chosen == [lines[0], "JF_KERNEL(sm90, forward, tiles, dense, half, 64, 64, 192, 2, alibi)"]
    with pytest.raises(ValueError, match="has no row sm90 forward dense 64 64: general"):
        tool.planted_library.table(lines, ("sm90 forward dense 64 64: general",))


@pytest.mark.parametrize("text", ["", "x = 1\nx = 1\n"])
def test_one_whose_text_is_gone_or_not_unique_is_stale(tool, lists, text):
    bug = tool.Mutant("bug", "a.py", "x = 1", "x = 2", "a promise", ("tests",), "cpu", "python")
    assert bug.planted("x = 1\ny = 1\n") == "x = 2\ny = 1\n"
    with pytest.raises(lists.Stale, match=r"occurs [02] times in a\.py"):
        bug.planted(text)
