"""The build's table of its kernels' registers, spills and shared memory, and the budget that it enforces."""

import importlib.util
import shutil
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "cmake" / "resources.py"
PLAIN = "_ZN9jax_flash5plainILi64EEEvNS_7ProblemEi"
GENERAL = "_ZN9jax_flash7generalILi64EEEvNS_7ProblemEi"
LOG = f"""ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{PLAIN}' for 'sm_80'
ptxas info    : Function properties for {PLAIN}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 384 bytes smem, 3156 bytes cmem[0]
ptxas info    : Compile time = 2075.058 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{GENERAL}' for 'sm_90'
ptxas info    : Function properties for {GENERAL}
    24 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 24 bytes cumulative stack size
"""


@pytest.fixture
def resources():
    if not SCRIPT.exists():
        pytest.skip("the build's scripts lie in the source tree only")
    spec = importlib.util.spec_from_file_location("resources", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def objects(tmp_path):
    (tmp_path / "a.o.ptxas").write_text(LOG)
    return [tmp_path / "a.o", tmp_path / "not_built.o"]


def test_what_ptxas_says_is_read(resources):
    kernel = resources.Kernel
    assert resources.parse(LOG) == [
        kernel(PLAIN, "sm_80", registers=255, stack=0, spills=0, shared=384),
        kernel(GENERAL, "sm_90", registers=40, stack=24, spills=4, shared=0),
    ]


def test_the_table_names_kernels_readably(resources, objects, tmp_path):
    table = tmp_path / "table.tsv"
    assert resources.main(["list", str(table), *map(str, objects)]) == 0
    assert table.read_text().splitlines() == [
        resources.HEADER,
        "sm_80\t255\t0\t0\t384\tplain<64>",
        "sm_90\t40\t24\t4\t0\tgeneral<64>",
    ]


def test_kinds_of_scores_have_their_names(resources):
    mangled = "_Z5plainIN9jax_flash1CILNS0_9ScoreKindE4EEEEvv"
    (kernel,) = resources.demangled([resources.Kernel(mangled, "sm_90", 1, 0, 0, 0)])
    assert kernel.name == "plain<C<segments> >()"


@pytest.mark.parametrize(("allowed", "status"), [(4, 0), (3, 1)])
def test_the_build_fails_over_budget(resources, objects, tmp_path, monkeypatch, capsys, allowed, status):
    table = tmp_path / "table.tsv"
    monkeypatch.setattr(resources, "BUDGET", (("^sm_90 general", allowed), ("", 0)))
    assert resources.main(["check", str(table), *map(str, objects)]) == status
    assert table.exists() == (status == 0)
    assert ("general<64> for sm_90 spills 4 bytes, more than the 3" in capsys.readouterr().err) == bool(
        status
    )


def test_the_build_fails_where_wgmma_run_one_by_one(resources, tmp_path, capsys):
    loss = f"(C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized in '{PLAIN}'"
    (tmp_path / "a.o.ptxas").write_text(f"ptxas info    : {loss}\n")
    assert resources.main(["check", str(tmp_path / "table.tsv"), str(tmp_path / "a.o")]) == 1
    assert loss[1:] in capsys.readouterr().err


def test_the_compiler_speaks_as_before(resources, tmp_path, capfd):
    script = f"import sys; print({LOG!r}); print('warning: something'); sys.exit(3)"
    target = tmp_path / "b.o"
    assert resources.main(["compile", str(target), "--", resources.sys.executable, "-c", script]) == 3
    assert capfd.readouterr().out.strip() == "warning: something"
    assert resources.parse((tmp_path / "b.o.ptxas").read_text())[0].name == PLAIN


@pytest.mark.parametrize(("called", "status"), [("atexit(f)", 0), ("atexit(f), exit(1)", 1)])
def test_a_device_function_called_on_the_host_fails(resources, tmp_path, capfd, called, status):
    """An object's table of strings may hold exit only as the end of atexit."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if not compiler or not shutil.which("nm"):
        pytest.skip("no C++ compiler")
    source, target = tmp_path / "c.cc", tmp_path / "c.o"
    source.write_text(f"#include <cstdlib>\nusing namespace std;\nvoid f() {{ {called}; }}\n")
    command = [compiler, "-c", str(source), "-o", str(target)]
    assert resources.main(["compile", str(target), "--", *command]) == status
    assert ("exit(1)" in capfd.readouterr().out) == bool(status)
    assert target.exists() == (status == 0)


def named(kernel: str, element: str, row: str, kind: str) -> str:
    """A kernel's name in the table: a Row begins with pass, design, loaders and elements."""
    return f"{kernel}<{element}, Row{{(Pass)0, (Design)0, 1u, 6u, {row}}}, {kind}, X> >"


@pytest.mark.parametrize(
    ("name", "common"),
    [
        (named("forward_sm80<ForwardSm80", "__half", "128, 128, 128, 64, 2, 4", "plain"), True),
        (named("forward_sm80<ForwardSm80", "__nv_bfloat16", "64, 64, 128, 64, 2, 4", "general"), False),
        (named("forward_sm80<ForwardSm80", "float", "128, 128, 64, 64, 1, 4", "plain"), False),
        (named("forward_sm90<ForwardSm90", "__half", "64, 64, 192, 128, 2, 16, 1", "plain"), True),
        (named("forward_sm90<ForwardSm90", "__half", "512, 512, 128, 64, 2, 12, 1", "plain"), True),
        (named("forward_sm90<ForwardSm90", "__half", "512, 512, 128, 64, 2, 12, 1", "general"), False),
        (named("backward_sm90<BackwardSm90", "__half", "128, 128, 64, 128, 2, 12, 1", "plain"), True),
        (named("backward_sm90<BackwardSm90", "__half", "192, 128, 64, 128, 2, 16, 1", "plain"), False),
        (named("tangent_sm80<TangentSm80", "__half", "64, 64, 128, 64, 2, 4", "plain"), True),
        (named("tangent_sm80<TangentSm80", "__half", "64, 64, 128, 64, 2, 4", "general_dropout"), False),
    ],
)
def test_common_kernels_may_not_spill(resources, name, common):
    kernel = resources.Kernel(name, "sm_90", registers=255, stack=8, spills=8, shared=0)
    assert bool(resources.over_budget([kernel])) == common
