"""The table of operands: their dimensions, and their order in the custom calls.

Abstract evaluation, batching, sharding rules and the operand bits of the FFI are all derived from it.
`csrc/core/spec.h` holds the same order as `enum class Operand`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

# Dimension names per layout. A trailing "*" marks a dimension that may also be 1 (broadcast).
_FIXED = {
    "query": ("b", "sq", "hq", "d"),
    "key": ("b", "sk", "hk", "d"),
    "value": ("b", "sk", "hk", "dv"),
    "out": ("b", "sq", "hq", "dv"),
    "lse": ("b", "hq", "sq"),
    "q_lengths": ("b",),
    "kv_lengths": ("b",),
    "q_segment_ids": ("b", "sq"),
    "kv_segment_ids": ("b", "sk"),
    "mask": ("b*", "hq*", "sq*", "sk*"),
    "bias": ("b*", "hq*", "sq*", "sk*"),
    "alibi_slopes": ("b*", "hq"),
    "sinks": ("hq",),
    "dropout": ("dropout",),
    "position": ("position",),
}
_VARLEN = {
    "query": ("tq", "hq", "d"),
    "key": ("tk", "hk", "d"),
    "value": ("tk", "hk", "dv"),
    "out": ("tq", "hq", "dv"),
    "lse": ("hq", "tq"),
    "cu_seqlens_q": ("n1",),
    "cu_seqlens_k": ("n1",),
    "kv_lengths": ("n",),
    "alibi_slopes": ("n*", "hq"),
    "sinks": ("hq",),
    "dropout": ("dropout",),
    "position": ("position",),
}
_PAGED = {
    "query": ("n", "sq", "hq", "d"),
    "key": ("p", "ps", "hk", "d"),
    "value": ("p", "ps", "hk", "dv"),
    "out": ("n", "sq", "hq", "dv"),
    "lse": ("n", "hq", "sq"),
    "kv_lengths": ("n",),
    "alibi_slopes": ("n*", "hq"),
    "sinks": ("hq",),
    "block_tables": ("n", "pages"),
    "k_scale": ("p*", "hk"),
    "v_scale": ("p*", "hk"),
    "position": ("position",),
    "draft_mask": ("n*", "draft_row", "draft_column"),
}
_PAGED_VARLEN = _PAGED | {
    "query": ("tq", "hq", "d"),
    "out": ("tq", "hq", "dv"),
    "lse": ("hq", "tq"),
    "cu_seqlens_q": ("n1",),
}
_APPEND = {
    "k_pages": ("p", "ps", "hk", "d"),
    "v_pages": ("p", "ps", "hk", "dv"),
    "key": ("n", "s", "hk", "d"),
    "value": ("n", "s", "hk", "dv"),
    "block_tables": ("n", "pages"),
    "kv_lengths": ("n",),
    "cos": ("positions", "rotated"),
    "sin": ("positions", "rotated"),
    "k_scale": ("p*", "hk"),
    "v_scale": ("p*", "hk"),
}
_APPEND_VARLEN = _APPEND | {"key": ("t", "hk", "d"), "value": ("t", "hk", "dv"), "cu_seqlens": ("n1",)}
DIMS: dict[str, dict[str, tuple[str, ...]]] = {
    "fixed": _FIXED,
    "varlen": _VARLEN,
    "paged": _PAGED,
    "paged_varlen": _PAGED_VARLEN,
    "append": _APPEND,
    "append_varlen": _APPEND_VARLEN,
}
for _table in DIMS.values():
    if "out" in _table:
        _table["dout"] = _table["out"]
        _table["delta"] = _table["lse"]
    for _name in ("query", "key", "value", "bias"):
        if _name in _table:
            _table["d" + _name] = _table[_name]
    for _name in ("query", "key", "value", "bias", "sinks", "out", "lse"):
        if _name in _table:
            _table["t" + _name] = _table[_name]


@cache
def dims_of(layout: str, page_layout: str) -> dict[str, tuple[str, ...]]:
    """The dimension names of every operand and result."""

    def ordered(dims: tuple[str, ...]) -> tuple[str, ...]:
        return ("p", "hk", "ps", dims[-1]) if dims[0] == "p" and page_layout == "hnd" else dims

    return {name: ordered(dims) for name, dims in DIMS[layout].items()}


# Optional operands, in the order of the custom call; the index is the operand's bit in the spec.
OPTIONAL = (
    "cu_seqlens_q",
    "cu_seqlens_k",
    "q_lengths",
    "kv_lengths",
    "q_segment_ids",
    "kv_segment_ids",
    "mask",
    "bias",
    "alibi_slopes",
    "sinks",
    "dropout",
    "block_tables",
    "k_scale",
    "v_scale",
    "position",
    "tbias",
    "draft_mask",
)
# The operand `dropout` is uint32 [6]: two key words, then the shard's global offsets of batch, query head, row, column.
DROPOUT_BATCH, DROPOUT_HEAD, DROPOUT_ROW = 2, 3, 4
# `position` is int32 [2]: where the first query and the first key of a call lie in the sequence that it is a part of.


@dataclass(frozen=True)
class Pass:
    """A pass of the library: its required operands, which the optional ones follow, and its results.

    The sharding of the operand `guide` decides how the pass is partitioned. The first `in_place` operands are
    overwritten by the results of the same name.
    """

    name: str
    operands: tuple[str, ...]
    results: tuple[str, ...]
    guide: str = "query"
    in_place: int = 0


FORWARD = Pass("forward", ("query", "key", "value"), ("out", "lse"))
BACKWARD = Pass("backward", ("query", "key", "value", "dout", "lse", "delta"), ("dquery", "dkey", "dvalue"))
BIAS_GRADIENT = Pass("bias_gradient", BACKWARD.operands, ("dbias",))
TANGENT = Pass(
    "tangent",
    ("query", "key", "value", "out", "lse", "tquery", "tkey", "tvalue"),
    ("tout", "tlse"),
)
APPEND = Pass(
    "append",
    ("k_pages", "v_pages", "key", "value", "block_tables", "kv_lengths"),
    ("k_pages", "v_pages"),
    guide="k_pages",
    in_place=2,
)
# Appends to float8 pools and keeps the scales of the pages that it writes to.
APPEND_DYNAMIC = Pass(
    "append_dynamic",
    ("k_pages", "v_pages", "k_scale", "v_scale", "key", "value", "block_tables", "kv_lengths"),
    ("k_pages", "v_pages", "k_scale", "v_scale"),
    guide="k_pages",
    in_place=4,
)
PASSES = (FORWARD, BACKWARD, BIAS_GRADIENT, TANGENT, APPEND, APPEND_DYNAMIC)

# Operands with a derivative. A call's differential is not a custom call: it is the operation, linear in the tangents
# that stand among its optional operands, that runs the tangent pass and whose transpose runs the backward passes.
DIFFERENTIABLE = ("query", "key", "value", "bias", "sinks")
TANGENTS = tuple("t" + name for name in DIFFERENTIABLE)
DIFFERENTIAL = Pass("differential", ("query", "key", "value", "out", "lse"), ("tout", "tlse"))


def like(result: str) -> str:
    """The operand whose dtype and sharding a result takes."""
    if result in ("out", "lse", "tout", "tlse"):
        return "query"
    return result.removeprefix("d") if result.startswith("d") else result


def operand_bits(names: tuple[str, ...]) -> int:
    """The bit set of the optional operands that are present, as C++ decodes it."""
    return sum(1 << OPTIONAL.index(name) for name in names)


def padded_head_dim(head_dim: int) -> int:
    """The head dim that CUDA kernels are called with: a multiple of 8, because they load 16 bytes at a time."""
    return head_dim + -head_dim % 8
