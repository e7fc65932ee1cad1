"""csrc/operands.def, results.def and spec.def, which C++ includes, in Python: arrays, passes and options.

Abstract evaluation, batching, sharding rules and the operand bits of the FFI are all derived from them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

Dims = tuple[str, ...]  # names of dimensions; a trailing "*" marks one that may also be 1 (broadcast)

ATTENTION_LAYOUTS = ("fixed", "varlen", "paged", "paged_varlen")
APPEND_LAYOUTS = ("append", "append_varlen")
_ROW = re.compile(r"JF_(\w+)\((.*)\)")
_CELL = re.compile(r'"([^"]*)"|(\w+)')
_FIELD = re.compile(r"  FIELD\((\w+), (\w+)\)")


def _text(table: str) -> str:
    """csrc/<table>.def. Wheels have the file in this package."""
    here = Path(__file__).resolve().parent
    own, source = here / f"{table}.def", here.parent / "csrc" / f"{table}.def"
    return (own if own.exists() else source).read_text()


def _rows(table: str) -> Iterator[tuple[str, list[str]]]:
    """The rows of csrc/<table>.def: the kind of each, and its arguments."""
    for line in _text(table).splitlines():
        if row := _ROW.match(line):
            yield row[1], [text or word for text, word in _CELL.findall(row[2])]


def _fields(struct: str) -> dict[str, str]:
    """The fields of a struct of csrc/spec.def, JF_<struct>_FIELDS, with their C++ types."""
    _, _, text = _text("spec").partition(f"#define JF_{struct}_FIELDS")
    return {name: type_ for type_, name in _FIELD.findall(text.partition("\n\n")[0])}


@dataclass(frozen=True)
class Pass:
    """A pass of the library: its required operands, which the optional ones follow, and its results.

    The sharding of its first operand, the guide, decides how the pass is partitioned. The first `in_place` operands are
    overwritten by the results of the same name. The first `in_full` ones have all leading dimensions.
    """

    name: str
    operands: tuple[str, ...]
    results: tuple[str, ...]
    in_place: int = 0
    in_full: int = 0

    @property
    def guide(self) -> str:
        return self.operands[0]


class _Tables:
    """The contents of the two files, by name."""

    def __init__(self) -> None:
        self.dims: dict[str, dict[str, Dims]] = {layout: {} for layout in ATTENTION_LAYOUTS + APPEND_LAYOUTS}
        self.optional: list[str] = []
        self.append_optional: list[str] = []
        self.differentiable: list[str] = []
        self.like: dict[str, str] = {}
        self.elements: dict[str, str] = {}
        self.passes: dict[str, Pass] = {}
        self.cuda_passes: dict[str, Pass] = {}
        self.limits: dict[str, int] = {}
        for table in ("operands", "results"):
            for kind, cells in _rows(table):
                add = getattr(self, f"_add_{kind.lower()}", None)
                if add:
                    add(*cells)
        for name in self.differentiable:
            self.like["t" + name] = name
        for name, other in self.like.items():
            self.elements[name] = self.elements[other]
            for layout in ATTENTION_LAYOUTS:
                if other in self.dims[layout]:
                    self.dims[layout][name] = self.dims[layout][other]

    def _add_limit(self, name: str, value: str) -> None:
        self.limits[name] = int(value)

    def _add_array(self, layouts: Dims, name: str, element: str, dims: tuple[str, ...]) -> None:
        self.elements[name] = element
        for layout, names in zip(layouts, dims, strict=True):
            if names:
                self.dims[layout][name] = tuple(names.split())

    def _add_required(self, name: str, element: str, derivative: str, *dims: str) -> None:
        self._add_array(ATTENTION_LAYOUTS, name, element, dims)
        if derivative == "yes":
            self.differentiable.append(name)

    def _add_optional(self, _: str, name: str, *cells: str) -> None:
        self._add_required(name, *cells)
        self.optional.append(name)

    def _add_optional_tangent(self, _: str, name: str, other: str) -> None:
        self.like[name] = other
        self.optional.append(name)

    def _add_append_required(self, name: str, element: str, *dims: str) -> None:
        self._add_array(APPEND_LAYOUTS, name, self.elements.get(name, element), dims)

    def _add_append_optional(self, _: str, name: str, element: str, *dims: str) -> None:
        self._add_append_required(name, element, *dims)
        self.append_optional.append(name)

    def _add_result(self, name: str, element: str, *dims: str) -> None:
        self._add_array(ATTENTION_LAYOUTS, name, element, dims)

    def _add_like(self, name: str, other: str) -> None:
        self.like[name] = other

    _add_tangent = _add_like

    def _add_pass(self, _: str, name: str, operands: str, results: str) -> None:
        self.passes[name] = Pass(name, tuple(operands.split()), tuple(results.split()))

    def _add_cuda_pass(self, _: str, name: str, operands: str, results: str) -> None:
        names = tuple(operands.split())
        self.cuda_passes[name] = Pass(name, names, tuple(results.split()), in_full=len(names))

    def _add_append_pass(self, _: str, name: str, operands: str, results: str) -> None:
        names = tuple(results.split())
        count = len(names)
        self.passes[name] = Pass(name, tuple(operands.split()), names, in_place=count, in_full=count)


_TABLES = _Tables()
# The largest d and dv; the largest d over a pool that K and V share; the widest row of such a pool for append_kv.
MAX_HEAD_DIM, MAX_LATENT_DIM, MAX_POOL_COLUMNS = (
    _TABLES.limits[name] for name in ("MaxHeadDim", "MaxLatentDim", "MaxPoolColumns")
)
# Dimension names of every operand and result, per layout, and their element types.
DIMS = _TABLES.dims
ELEMENTS = _TABLES.elements
# Optional operands, in the order of the custom call; the index is the operand's bit in the spec.
OPTIONAL = tuple(_TABLES.optional)
APPEND_OPTIONAL = tuple(_TABLES.append_optional)
# The attributes of the custom calls: the C++ type of each field of AttentionSpec and AppendSpec.
ATTENTION_FIELDS, APPEND_FIELDS = _fields("ATTENTION"), _fields("APPEND")
PASSES = tuple(_TABLES.passes.values())
FORWARD, BACKWARD, BIAS_GRADIENT, TANGENT = (
    _TABLES.passes[name] for name in ("forward", "backward", "bias_gradient", "tangent")
)
APPEND = _TABLES.passes["append"]
# Appends to float8 pools and keeps the scales of the pages that it writes to.
APPEND_DYNAMIC = _TABLES.passes["append_dynamic"]
# Operands with a derivative. A call's differential is not a custom call: it is the operation, linear in the tangents
# that stand among its optional operands, that runs the tangent pass and whose transpose runs the backward passes.
DIFFERENTIABLE = tuple(_TABLES.differentiable)
TANGENTS = tuple("t" + name for name in DIFFERENTIABLE)
_MOVING = tuple(name for name in FORWARD.results if "t" + name in TANGENT.results)
DIFFERENTIAL = Pass("differential", FORWARD.operands + _MOVING, TANGENT.results)
# delta = rowsum(dout ∘ out) (delta.py). The forward's operands are not read; they decide how it is partitioned.
_DELTA = _TABLES.cuda_passes["delta"]
DELTA = replace(_DELTA, operands=_DELTA.operands + FORWARD.operands)


@cache
def dims_of(layout: str, page_layout: str) -> dict[str, Dims]:
    """The dimension names of every operand and result."""

    def ordered(dims: Dims) -> Dims:
        return ("p", "hk", "ps", dims[-1]) if dims[0] == "p" and page_layout == "hnd" else dims

    return {name: ordered(dims) for name, dims in DIMS[layout].items()}


# The operand `dropout` is uint32 [6]: two key words, then the shard's global offsets of batch, query head, row, column.
DROPOUT_BATCH, DROPOUT_HEAD, DROPOUT_ROW = 2, 3, 4
# `position` is int32 [2]: where the first query and the first key of a call lie in the sequence that it is a part of.

# The operands of a window that is data.
WINDOW = ("window_left", "window_right", "window_offset")


def like(result: str) -> str:
    """The operand whose dtype and sharding a result takes."""
    source = _TABLES.like.get(result, result)
    return FORWARD.guide if source in FORWARD.results else source


def is_float32(result: str) -> bool:
    """Whether a result is float32 whatever the dtype of the operand that it is like."""
    return ELEMENTS[result] == "float32"


def operand_bits(names: tuple[str, ...]) -> int:
    """The bit set of the optional operands that are present, as C++ decodes it."""
    return sum(1 << OPTIONAL.index(name) for name in names)


def whole_chunks(columns: int) -> int:
    """The columns that CUDA kernels are called with: a multiple of 8, because they load 16 bytes at a time."""
    return columns + -columns % 8
