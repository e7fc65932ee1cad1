"""AttentionSpec and AppendSpec: the static options of a call in one frozen value, and their FFI encoding."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ._version import __version__
from .operands import APPEND_OPTIONAL, ATTENTION_LAYOUTS, Pass, dims_of, operand_bits

Layout = Literal["fixed", "varlen", "paged", "paged_varlen"]
PAGE_LAYOUTS = ("nhd", "hnd")
SCALINGS = ("static", "dynamic")
ALIGNMENTS = ("bottom_right", "top_left")
ORDERS = ("contiguous", "zigzag")
UNLIMITED = -1


@dataclass(frozen=True)
class Ring:
    """The devices that share a sequence: the mesh axes that it is split over, their size, and the order of its shards.

    In zigzag order each of n devices holds the chunks i and 2n − 1 − i of 2n.
    """

    axes: tuple[str, ...]
    size: int
    order: str = "contiguous"


@dataclass(frozen=True)
class AttentionSpec:
    """The static options of one attention call.

    `left` and `right` are the numbers of keys visible before and after the diagonal, or UNLIMITED; causal is `right =
    0`. `softcap` and `dropout_rate` are 0 when off. `operands` names the optional arrays in call order. The four fields
    from `page_layout` on are for the paged layouts; with `num_splits` 0 the plan chooses the number of splits. Where
    `value_dim` is not 0, V is the first `value_dim` columns of K, stored once, and the operand `value` is `key` again.
    With `same_offsets`, packed queries and keys have the same array of offsets. With a `ring`, every operand with a row
    or key per token is the local shard of a sequence; columns of mask and bias, and lengths, are those of the whole.
    """

    layout: Layout
    left: int = UNLIMITED
    right: int = UNLIMITED
    align: str = "bottom_right"
    scale: float = 1.0
    softcap: float = 0.0
    dropout_rate: float = 0.0
    deterministic: bool = False
    operands: tuple[str, ...] = ()
    implementation: str | None = None
    page_layout: str = "nhd"
    num_splits: int = 0
    batch_invariant: bool = False
    value_dim: int = 0
    same_offsets: bool = False
    ring: Ring | None = None

    @property
    def paged(self) -> bool:
        return self.layout.startswith("paged")

    @property
    def packed(self) -> bool:
        """Whether the query rows of all sequences share one dimension."""
        return self.layout.endswith("varlen")

    @property
    def limited(self) -> bool:
        """Whether a row sees keys only up to some distance from its diagonal."""
        return self.left != UNLIMITED or self.right != UNLIMITED

    @property
    def dims(self) -> dict[str, tuple[str, ...]]:
        """The dimension names of every operand and result."""
        dims = dims_of(self.layout, self.page_layout)
        as_keys = {x + "value": dims[x + "key"] for x in ("", "d", "t")}
        return dims | as_keys if self.value_dim else dims

    def ffi_attributes(self) -> dict[str, Any]:
        """The attributes of the custom call; this is the only place where Python values get their C++ types."""
        return {
            "layout": np.int32(ATTENTION_LAYOUTS.index(self.layout)),
            "align": np.int32(ALIGNMENTS.index(self.align)),
            "left": np.int32(self.left),
            "right": np.int32(self.right),
            "scale": np.float32(self.scale),
            "softcap": np.float32(self.softcap),
            "dropout_rate": np.float32(self.dropout_rate),
            "deterministic": np.bool_(self.deterministic),
            "operands": np.int32(operand_bits(self.operands)),
            "page_layout": np.int32(PAGE_LAYOUTS.index(self.page_layout)),
            "num_splits": np.int32(self.num_splits),
            "batch_invariant": np.bool_(self.batch_invariant),
            "value_dim": np.int32(self.value_dim),
        }

    def plain_attributes(self) -> dict[str, Any]:
        """The attributes as Python's own numbers, which the extension takes."""
        return {name: value.item() for name, value in self.ffi_attributes().items()}

    def digest(self) -> str:
        """A short hash, stable across processes, that names this spec in compiled programs."""
        return _digest(self)


@dataclass(frozen=True)
class AppendSpec:
    """The static options of one append_kv call; layout "append" or "append_varlen".

    With `dynamic`, k_scale and v_scale are overwritten like the pools, and are not among the optional `operands`.
    """

    layout: str
    page_layout: str = "nhd"
    interleaved: bool = False
    operands: tuple[str, ...] = ()
    implementation: str | None = None
    dynamic: bool = False

    @property
    def dims(self) -> dict[str, tuple[str, ...]]:
        return dims_of(self.layout, self.page_layout)

    def ffi_attributes(self) -> dict[str, Any]:
        """The attributes of the custom call."""
        return {
            "page_layout": np.int32(PAGE_LAYOUTS.index(self.page_layout)),
            "interleaved": np.bool_(self.interleaved),
            "operands": np.int32(sum(1 << APPEND_OPTIONAL.index(name) for name in self.operands)),
        }

    def digest(self) -> str:
        return _digest(self)


Spec = AttentionSpec | AppendSpec


def operand_names(pass_: Pass, spec: Spec) -> tuple[str, ...]:
    """The operands of a call of the pass, in its order."""
    return pass_.operands + spec.operands


def _digest(spec: Spec) -> str:
    return hashlib.sha256(f"{__version__} {spec!r}".encode()).hexdigest()[:12]
