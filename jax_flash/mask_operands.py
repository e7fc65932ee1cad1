"""What a `masks.Mask` is to one call: the operand `ranges`, segment ids, a boolean array, or a band of its spec."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from . import mask_forms as forms
from ._jax import same_dim
from .checker import Checker
from .mask_forms import Form, Rows
from .masks import Mask, both_segments
from .operands import OPTIONAL
from .paged import gather
from .spec import UNLIMITED, AttentionSpec, Ring
from .zigzag import zigzag_unpermute

Operands = dict[str, Array]


@dataclass(frozen=True)
class Sizes:
    """The dimensions of a call that arrays of masks have.

    Only calls whose keys are arrays of their own have `keys`; `columns` are those of all devices of a ring.
    """

    batch: Any  # batch entries or sequences
    heads: Any
    rows: Any
    keys: Any = None
    columns: Any = None
    packed: bool = False

    def shape(self, dims: str) -> tuple[Any, ...]:
        sizes = {"b": self.batch, "n": self.batch, "hq": self.heads, "sq": self.rows, "tq": self.rows}
        sizes |= {"sk": self.keys, "columns": self.columns}
        return tuple(sizes[dim] for dim in dims.split())


def apply(
    check: Checker, mask: Mask, spec: AttentionSpec, operands: Operands, ring: Ring | None = None
) -> AttentionSpec:
    """Adds what a mask says to the operands of a call, and returns its spec."""
    sizes = _sizes(spec, operands, ring)
    for condition in _flat(mask.conditions):
        _check(check, condition, sizes)
    mask, spec = _without_band(mask, spec)
    _add(check, mask, operands, _rows(spec, operands, ring), sizes)
    return replace(spec, operands=tuple(name for name in OPTIONAL if name in operands))


def _add(check: Checker, mask: Mask, operands: Operands, rows: Rows, sizes: Sizes) -> None:
    if sizes.packed and same_dim(sizes.batch, 0):
        return  # no row is of a sequence
    visible = forms.resolve(mask.conditions, rows)
    if visible.blocks is not None:
        raise check.fail(
            "mask has masks.blocks(…), which no implementation has yet; masks.dense(…) takes any mask",
            NotImplementedError,
        )
    if visible.pairs:
        whole = jnp.zeros((1, 1, sizes.rows), jnp.int32)
        limits = jnp.broadcast_arrays(whole, *(x for pair in visible.pairs for x in pair))
        ranges = jnp.stack(limits[1:], -1)
        operands["ranges"] = ranges[0] if sizes.packed else ranges
    if visible.segments is not None:
        _add_segments(operands, visible.segments, sizes)
    if visible.dense is not None:
        operands["mask"] = visible.dense


def _add_segments(operands: Operands, ids: forms.Segments, sizes: Sizes) -> None:
    q = jnp.broadcast_to(ids.q_ids, (sizes.batch, sizes.rows))
    k = jnp.broadcast_to(ids.kv_ids, (sizes.batch, ids.kv_ids.shape[-1]))
    if "q_segment_ids" in operands:
        given = forms.Segments(operands["q_segment_ids"], operands["kv_segment_ids"])
        both = both_segments(given, forms.Segments(q, k))
        q, k = both.q_ids, both.kv_ids
    operands["q_segment_ids"], operands["kv_segment_ids"] = q, k


# --- a band --------------------------------------------------------------------------------------------------------


def _without_band(mask: Mask, spec: AttentionSpec) -> tuple[Mask, AttentionSpec]:
    """The mask without its bands of Python ints, where the spec can have them: plain kernels serve them.

    They are aligned to the top left, so that a band of the call's own and ALiBi must be so too.
    """
    if spec.align != "top_left" and (spec.limited or "alibi_slopes" in spec.operands):
        return mask, spec
    rest = []
    left, right = spec.left, spec.right
    for condition in mask.conditions:
        sides = _static_sides(condition)
        if sides is None:
            rest.append(condition)
            continue
        left, right = (_narrower(a, b) for a, b in zip((left, right), sides))
    if len(rest) == len(mask.conditions):
        return mask, spec
    return Mask(tuple(rest)), replace(spec, left=left, right=right, align="top_left")


def _static_sides(condition: Form) -> tuple[int, int] | None:
    """Keys to the left and to the right of the diagonal, if they are numbers that a spec can have."""
    if not isinstance(condition, forms.Band) or not isinstance(condition.offset, int):
        return None
    found = []
    for side, toward in ((condition.left, -1), (condition.right, 1)):
        if side is None:
            found.append(UNLIMITED)
        elif isinstance(side, int) and 0 <= side + toward * condition.offset < forms.MOST:
            found.append(side + toward * condition.offset)
        else:
            return None
    return found[0], found[1]


def _narrower(a: int, b: int) -> int:
    return max(a, b) if UNLIMITED in (a, b) else min(a, b)


# --- rows ----------------------------------------------------------------------------------------------------------


def _sizes(spec: AttentionSpec, operands: Operands, ring: Ring | None) -> Sizes:
    heads, tokens = operands["query"].shape[-2], operands["query"].shape[-3]
    if spec.packed:
        return Sizes(operands["cu_seqlens_q"].shape[0] - 1, heads, tokens, packed=True)
    if spec.paged:
        return Sizes(operands["query"].shape[0], heads, tokens)
    keys = operands["key"].shape[1]
    return Sizes(operands["query"].shape[0], heads, tokens, keys, keys if ring is None else keys * ring.size)


def _rows(spec: AttentionSpec, operands: Operands, ring: Ring | None) -> Rows:
    if spec.paged:
        page_size = operands["key"].shape[spec.dims["key"].index("ps")]
        return _paged_rows(operands, gather.table_capacity(operands["block_tables"], page_size))
    return _varlen_rows(operands) if spec.layout == "varlen" else _fixed_rows(operands, ring)


def _fixed_rows(operands: Operands, ring: Ring | None) -> Rows:
    """The rows of a call of equal lengths, or of a shard of one."""
    sq, sk = operands["query"].shape[1], operands["key"].shape[1]
    whole = Rows.fixed(sq, sk)
    if ring is not None:
        whole = _ring_rows(ring, sq, sk)
    if "kv_lengths" not in operands:
        return whole
    return replace(whole, keys=jnp.clip(operands["kv_lengths"], 0, whole.keys[0, 0])[:, None])


def _ring_rows(ring: Ring, sq: int, sk: int) -> Rows:
    """This device's rows, by their positions in the whole sequence."""
    device, n = lax.axis_index(ring.axes), ring.size
    index = device * sq + jnp.arange(sq, dtype=jnp.int32)
    if ring.order == "zigzag":
        half = jnp.arange(sq // 2, dtype=jnp.int32)
        index = jnp.concatenate([device * (sq // 2) + half, (2 * n - 1 - device) * (sq // 2) + half])

    def gathered(x: Array) -> Array:
        every = lax.all_gather(x, ring.axes, axis=x.ndim - 1, tiled=True)
        return zigzag_unpermute(every, n, x.ndim - 1) if ring.order == "zigzag" else every

    lengths, keys = (jnp.full((1, 1), n * s, jnp.int32) for s in (sq, sk))
    return Rows(index[None].astype(jnp.int32), lengths, keys, whole=gathered)


def _varlen_rows(operands: Operands) -> Rows:
    """The rows of packed sequences whose keys are packed too."""
    starts = lax.cummax(jnp.clip(operands["cu_seqlens_k"], 0, operands["key"].shape[0]))
    keys = jnp.diff(starts)
    if "kv_lengths" in operands:
        keys = jnp.clip(operands["kv_lengths"], 0, keys)
    return _packed_rows(operands, keys)


def _paged_rows(operands: Operands, capacity: Any) -> Rows:
    """The rows of sequences whose keys are in pages, of which each has a `capacity`."""
    keys = jnp.clip(operands["kv_lengths"], 0, capacity)
    if "cu_seqlens_q" in operands:
        return _packed_rows(operands, keys)
    sq = operands["query"].shape[1]
    return replace(Rows.fixed(sq, 0), keys=keys[:, None])


def _packed_rows(operands: Operands, keys: Array) -> Rows:
    sequence, row, rows = gather.locate(operands["cu_seqlens_q"], operands["query"].shape[0])
    keys = jnp.pad(keys, (0, 1))[sequence]  # padded, because there may be no sequence at all
    outside = operands["cu_seqlens_q"].shape[0] - 1  # a sequence of their own, so that no span reaches them
    return Rows(row[None], rows[None], keys[None], jnp.where(row < 0, outside, sequence))


# --- checks --------------------------------------------------------------------------------------------------------


def require_mask(check: Checker, mask: Any) -> Mask:
    """The argument `mask` of layouts that take values of jax_flash.masks alone."""
    if isinstance(mask, Mask):
        return mask
    raise check.fail(
        f"mask must be a value of jax_flash.masks, got {type(mask).__name__}; boolean arrays are for flash_attention",
        TypeError,
    )


def _flat(conditions: tuple[Form, ...]) -> Iterator[Form]:
    for x in conditions:
        if isinstance(x, forms.Either):
            yield from _flat(x.a)
            yield from _flat(x.b)
        else:
            yield x


def _check(check: Checker, x: Form, sizes: Sizes) -> None:
    """Whether the arrays of a condition have the sizes of the call."""

    def fits(name: str, array: Any, dims: str) -> None:
        if array is not None and jnp.ndim(array) > 0:
            check.broadcastable(f"mask's {name}", array, sizes.shape(dims), dims)

    entry = "n" if sizes.packed else "b"
    for name in ("left", "right", "offset", "lengths", "first"):
        fits(name, getattr(x, name, None), entry)
    if isinstance(x, forms.Ranges):
        for lo, hi in x.limits:
            fits("lo", lo, "hq tq" if sizes.packed else "b hq sq")
            fits("hi", hi, "hq tq" if sizes.packed else "b hq sq")
    elif isinstance(x, forms.Spans):
        ids = x.ids[0] if sizes.packed and x.ids.ndim == 2 else x.ids
        fits("span ids", ids, "tq" if sizes.packed else "b sq")
    elif isinstance(x, (forms.Segments, forms.Positions, forms.Dense)) and sizes.keys is None:
        kind = type(x).__name__.lower().replace("positions", "by_position")
        raise check.fail(
            f"mask has masks.{kind}(…), which is for flash_attention and ring_attention; ranges of keys "
            "are for every function",
            NotImplementedError,
        )
    elif isinstance(x, forms.Segments):
        fits("segments of queries", x.q_ids, "b sq")
        fits("segments of keys", x.kv_ids, "b sk")
    elif isinstance(x, forms.Positions):
        fits("q_positions", x.q_positions, "b sq")
        fits("kv_positions", x.kv_positions, "b sk")
    elif isinstance(x, forms.Dense):
        fits("dense array", x.seen, "b hq sq columns")
