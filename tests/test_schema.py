"""csrc/operands.def and csrc/results.def as C++ and Python read them, and what C++ derives from them. No GPU needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from jax_flash import operands, spec

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "tests" / "kernels"
# Element sizes in the driver's call; every other element has 4 bytes.
BYTES = {"activation": 2, "pool": 1, "bias": 4, "boolean": 1}


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """The lines of tests/kernels/schema, by their first word."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or not (ROOT / "csrc").exists():
        pytest.skip("needs a C++ compiler and the sources")
    program = tmp_path_factory.mktemp("schema") / "schema"
    options = [
        "-std=c++20",
        "-O0",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-I",
        ROOT / "csrc",
        "-I",
        KERNELS / "emulator",
    ]
    subprocess.run([compiler, *options, KERNELS / "schema" / "main.cc", "-o", program], check=True)
    done = subprocess.run([program], text=True, capture_output=True, check=True)
    lines: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        kind, rest = line.split(" ", 1)
        lines.setdefault(kind, []).append(rest)
    return lines


def test_both_languages_read_the_same_dimensions(printed):
    found = {layout: {} for layout in operands.DIMS}
    for line in printed["array"]:
        name, *dims = (part.strip() for part in line.split("|"))
        layouts = operands.ATTENTION_LAYOUTS if len(dims) == 4 else operands.APPEND_LAYOUTS
        for layout, names in zip(layouts, dims, strict=True):
            if names:
                found[layout][name] = tuple(names.split())
    without_kernels = {"tsinks"}  # JAX computes this tangent, so kernels do not take it
    wanted = {
        layout: {name: dims for name, dims in table.items() if name not in without_kernels}
        for layout, table in operands.DIMS.items()
    }
    assert found == wanted


def test_both_languages_read_the_same_passes(printed):
    wanted = [f"{p.name} | {' '.join(p.operands)} | {' '.join(p.results)}" for p in operands.PASSES]
    assert printed["pass"] == wanted


def test_the_names_of_each_enum_are_in_the_order_of_its_values():
    header = (ROOT / "csrc" / "core" / "spec.h").read_text()
    for enum, names in spec.ENUMS.items():
        (body,) = re.findall(rf"enum class {enum} : int32_t {{ (.*) }};", header)
        values = [f"k{name.title().replace('_', '')} = {value}" for value, name in enumerate(names)]
        assert body == ", ".join(values)


@pytest.mark.parametrize(
    ("python", "fields", "made", "own"),
    [
        (
            spec.AttentionSpec("fixed", block=(3, 5), left=7, operands=("bias",)),
            operands.ATTENTION_FIELDS,
            {"block_rows": 3, "block_keys": 5, "operands": 1 << operands.OPTIONAL.index("bias")},
            {"block", "implementation", "same_offsets", "reach", "ring"},
        ),
        (
            spec.AppendSpec("append", interleaved=True, operands=("sin",)),
            operands.APPEND_FIELDS,
            {"operands": 1 << operands.APPEND_OPTIONAL.index("sin")},
            {"layout", "implementation", "dynamic"},
        ),
    ],
)
def test_every_field_of_a_spec_reaches_cpp_or_is_pythons_own(python, fields, made, own):
    values = vars(python)
    assert set(values) - own == set(fields) - set(made) | {"operands"}
    for name, attribute in python.ffi_attributes().items():
        value = made.get(name, values.get(name))
        names = spec.ENUMS.get(fields[name])
        assert attribute == (names.index(value) if names else value)
        assert type(attribute) is {"float": np.float32, "bool": np.bool_}.get(fields[name], np.int32)


def test_a_call_with_two_leading_dimensions_launches_slice_by_slice(printed):
    """Each slice has the entries of the last dimension, its own schedules, and its share of the grid's blocks."""
    one_dimension = ["kernel 0 5 30"]  # what, offset of query in bytes, entries, blocks
    slices = [f"{what} {200 * i} 5 10" for i in range(3) for what in ("schedules", "kernel")]
    assert printed["launch"] == one_dimension + slices


def test_each_view_of_a_call_is_cut_into_slices_of_leading_dimensions(printed):
    """A kernel with tensor maps has room for one leading dimension, so that a call with two runs slice by slice."""
    found = {name: float(size) for name, size, step in map(str.split, printed["slice"]) if step == "7"}
    elements = operands.ELEMENTS
    arrays = set().union(*(operands.DIMS[layout] for layout in operands.ATTENTION_LAYOUTS))
    arrays -= {  # not fields of Problem
        "t" + name for name in operands.DIFFERENTIABLE + operands.FORWARD.results
    }
    assert "draft_mask" in arrays
    assert found == {name: BYTES.get(elements[name], 4) for name in arrays}


def test_every_required_operand_and_result_has_dimensions_in_each_layout():
    for layout in operands.ATTENTION_LAYOUTS:
        for pass_ in (operands.FORWARD, operands.BACKWARD, operands.TANGENT):
            assert set(pass_.operands + pass_.results) <= operands.DIMS[layout].keys()


@pytest.mark.parametrize("name", operands.OPTIONAL)
def test_an_optional_operand_belongs_to_some_layout(name):
    assert any(name in operands.DIMS[layout] for layout in operands.ATTENTION_LAYOUTS)
