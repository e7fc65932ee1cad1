"""AttentionSpec and AppendSpec: the static options of a call in one frozen value, and their FFI encoding."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from ._version import __version__
from .operands import (
    APPEND_FIELDS,
    APPEND_OPTIONAL,
    ATTENTION_FIELDS,
    ATTENTION_LAYOUTS,
    WINDOW,
    Pass,
    dims_of,
    operand_bits,
)

Layout = Literal["fixed", "varlen", "paged", "paged_varlen"]
PAGE_LAYOUTS = ("nhd", "hnd")
SCALINGS = ("static", "dynamic")
ALIGNMENTS = ("bottom_right", "top_left")
ORDERS = ("contiguous", "zigzag")
# The names of the enums of csrc/core/spec.h, in their order, and the other types of csrc/spec.def.
ENUMS = {"Layout": ATTENTION_LAYOUTS, "Align": ALIGNMENTS, "PageLayout": PAGE_LAYOUTS}
_TYPES = {"int32_t": np.int32, "float": np.float32, "bool": np.bool_}
UNLIMITED = -1


def narrower(a: int, b: int) -> int:
    """The smaller of two limits."""
    return max(a, b) if UNLIMITED in (a, b) else min(a, b)


def wider(a: int, b: int) -> int:
    """The larger of two limits."""
    return UNLIMITED if UNLIMITED in (a, b) else max(a, b)


class Reach(NamedTuple):
    """A bound, known while tracing, on the keys that row i sees: at most `left` keys before and `right` keys after key
    i, all in key i's chunk of `chunk` keys. UNLIMITED: no bound is known."""

    left: int = UNLIMITED
    right: int = UNLIMITED
    chunk: int = UNLIMITED


ANYWHERE = Reach()


@dataclass(frozen=True)
class Ring:
    """The devices that share a sequence: the mesh axes that it is split over, their size, and the order of its shards.

    In zigzag order each of n devices holds the chunks i and 2n − 1 − i of 2n. Devices are numbered along `axes`, the
    first of which is the slowest. `mesh_axes` are the same axes in the mesh's order. With `whole` "keys" or "queries"
    each device has all of these, and only the others are split; then devices send results, and sums of gradients.
    """

    axes: tuple[str, ...]
    size: int
    order: str = "contiguous"
    mesh_axes: tuple[str, ...] = ()
    whole: str = ""

    @classmethod
    def on(
        cls, mesh: Any, axes: tuple[str, ...], size: int, order: str = "contiguous", *, whole: str = ""
    ) -> Ring:
        return cls(axes, size, order, tuple(axis for axis in mesh.axis_names if axis in axes), whole)

    def shards(self, of: str) -> int:
        """The number of shards of the "queries" or of the "keys"."""
        return 1 if self.whole == of else self.size


@dataclass(frozen=True)
class AttentionSpec:
    """The static options of one attention call.

    `left` and `right` are the numbers of keys visible before and after the diagonal, or UNLIMITED; causal is `right =
    0`. `softcap` and `dropout_rate` are 0 when off. `bias_first`, set only if there are a softcap and a bias, adds the
    bias before the softcap. `operands` names the optional arrays in call order. `page_layout`, `num_splits` (0: chosen
    by the plan) and `batch_invariant` are for the paged layouts. If `value_dim` is not 0, K and V share an array, and
    the operand `value` is `key` again: K is its first columns, as many as the query has, and V its columns
    [`value_start`, `value_start + value_dim`), which may overlap K. Without pages, V then is K. The gradient of `key`
    is the sum of both. `block`: the numbers of rows and of keys in a block of the operand `block_mask`. With `row_max`
    the forward also returns the largest visible score of each row. With `same_offsets`, packed queries and keys have
    the same array of offsets. `reach` bounds the keys in `ranges`. With a `ring`, every operand with a row or key per
    token is the local shard of a sequence; columns of mask and bias, and lengths, are those of the whole.
    """

    layout: Layout
    left: int = UNLIMITED
    right: int = UNLIMITED
    align: str = "bottom_right"
    scale: float = 1.0
    softcap: float = 0.0
    bias_first: bool = False
    dropout_rate: float = 0.0
    deterministic: bool = False
    operands: tuple[str, ...] = ()
    implementation: str | None = None
    page_layout: str = "nhd"
    num_splits: int = 0
    batch_invariant: bool = False
    value_dim: int = 0
    value_start: int = 0
    same_offsets: bool = False
    block: tuple[int, int] = (0, 0)
    row_max: bool = False
    reach: Reach = ANYWHERE
    ring: Ring | None = None

    @property
    def paged(self) -> bool:
        return self.layout.startswith("paged")

    @property
    def shared_kv(self) -> bool:
        """Whether K and V are one array."""
        return self.value_dim > 0

    @property
    def packed(self) -> bool:
        """Whether the query rows of all sequences share one dimension."""
        return self.layout.endswith("varlen")

    @property
    def limited(self) -> bool:
        """Whether a row sees keys only up to some distance from its diagonal."""
        return self.left != UNLIMITED or self.right != UNLIMITED

    @property
    def window_is_data(self) -> bool:
        """Whether operands hold a window, so that `left` and `right` do not tell what a row sees."""
        return not set(WINDOW).isdisjoint(self.operands)

    @property
    def dims(self) -> dict[str, tuple[str, ...]]:
        """The dimension names of every operand and result."""
        dims = dims_of(self.layout, self.page_layout)
        if not self.shared_kv:
            return dims
        pool = (*dims["key"][:-1], "pool_columns")
        return dims | {x + name: pool for x in ("", "d", "t") for name in ("key", "value")}

    def ffi_attributes(self) -> dict[str, Any]:
        """The attributes of the custom call."""
        rows, keys = self.block
        made = {"operands": operand_bits(self.operands), "block_rows": rows, "block_keys": keys}
        return _attributes(ATTENTION_FIELDS, vars(self) | made)

    def plain_attributes(self) -> dict[str, Any]:
        """The attributes as Python's own numbers, which the extension takes."""
        return {name: value.item() for name, value in self.ffi_attributes().items()}

    def digest(self) -> str:
        """A short hash, stable across processes, that names this spec in compiled programs."""
        return _digest(self)


@dataclass(frozen=True)
class AppendSpec:
    """The static options of one append_kv call; layout "append" or "append_varlen".

    With `dynamic`, k_scale and v_scale are overwritten like the pools, and are not among the optional `operands`. With
    `split_columns` the last dimension of k_pages is stored as two.
    """

    layout: str
    page_layout: str = "nhd"
    interleaved: bool = False
    operands: tuple[str, ...] = ()
    implementation: str | None = None
    dynamic: bool = False
    split_columns: bool = False
    # What attention has and append_kv does not.
    paged: ClassVar[bool] = False
    shared_kv: ClassVar[bool] = False
    value_dim: ClassVar[int] = 0
    value_start: ClassVar[int] = 0
    ring: ClassVar[None] = None

    @property
    def dims(self) -> dict[str, tuple[str, ...]]:
        dims = dims_of(self.layout, self.page_layout)
        return dims | {"k_pages": (*dims["k_pages"][:-1], "parts", "part")} if self.split_columns else dims

    def ffi_attributes(self) -> dict[str, Any]:
        """The attributes of the custom call."""
        bits = sum(1 << APPEND_OPTIONAL.index(name) for name in self.operands)
        return _attributes(APPEND_FIELDS, vars(self) | {"operands": bits})

    def digest(self) -> str:
        return _digest(self)


Spec = AttentionSpec | AppendSpec


def operand_names(pass_: Pass, spec: Spec) -> tuple[str, ...]:
    """The operands of a call of the pass, in its order."""
    return pass_.operands + spec.operands


def result_names(pass_: Pass, spec: Spec) -> tuple[str, ...]:
    """The results of a call of the pass; where K and V are one array, dkey is the gradient of both."""
    if not isinstance(spec, AttentionSpec):
        return pass_.results
    missing = {"dvalue"} if spec.shared_kv else set()
    missing |= set() if spec.row_max else {"row_max"}
    return tuple(name for name in pass_.results if name not in missing)


def _attributes(fields: dict[str, str], values: dict[str, Any]) -> dict[str, Any]:
    """The values of the fields in their C++ types; no other place converts them."""
    return {
        name: np.int32(ENUMS[type_].index(values[name])) if type_ in ENUMS else _TYPES[type_](values[name])
        for name, type_ in fields.items()
    }


def _digest(spec: Spec) -> str:
    return hashlib.sha256(f"{__version__} {spec!r}".encode()).hexdigest()[:12]
