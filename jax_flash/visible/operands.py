"""Turns a `masks.Mask` into arguments of one call: the operand `ranges`, segment ids, a boolean array, or a band."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from .. import _jax, offsets
from .._jax import same_dim
from ..checker import Checker, function_text, is_function
from ..masks import Mask
from ..operands import OPTIONAL
from ..paged import gather
from ..sequence.passes import takes_blocks
from ..sequence.transfer import gathered
from ..spec import AttentionSpec, Ring
from ..zigzag import zigzag_unpermute
from . import bands, conjunctions, elements, forms
from .forms import Form
from .joins import both_segments, merged
from .rows import Data, PackedKeys, Rows
from .sizes import Sizes, check_sizes

Operands = dict[str, Array]
# The arrays of a call that masks read.
_READ = ("cu_seqlens_q", "cu_seqlens_k", "kv_lengths", "q_segment_ids", "kv_segment_ids")


def apply(
    check: Checker, mask: Mask, spec: AttentionSpec, operands: Operands, ring: Ring | None = None
) -> AttentionSpec:
    """Adds what a mask says to the operands of a call, and returns its spec."""
    sizes = _sizes(spec, operands, ring)
    for condition in conjunctions.flat(mask.conditions):
        check_sizes(check, condition, sizes)
    if spec.align != "top_left" and _has_one_diagonal(spec, sizes, ring):
        spec = replace(spec, align="top_left")
    mask, spec = bands.without_numbers(mask, spec)
    mask, spec, window = bands.without_arrays(mask, spec, ring)
    block = elements.block_of(mask.conditions, sizes)
    if any(block) and "draft_mask" in operands:
        blocks = all(not isinstance(x, forms.Dense) for x in mask.conditions)
        name = "masks.blocks(…)" if blocks else "masks.dense(…)"
        raise check.fail(
            f"mask has {name}, which no implementation has beside draft_mask; merge_attention joins a call of the keys "
            "before the draft, with the mask, and one of the draft's own keys, with draft_mask",
            NotImplementedError,
        )
    if any(block) and ring is not None and not takes_blocks(spec, sizes.rows, sizes.keys):
        raise check.fail(
            "mask has masks.blocks(…), beside which causal, window and alibi_slopes need align='top_left' where "
            "lengths may move the diagonal",
            NotImplementedError,
        )
    if not (sizes.packed and same_dim(sizes.batch, 0)):  # otherwise no row belongs to a sequence
        spec = _add(mask, window, replace(spec, block=block), operands, ring, sizes)
    return replace(spec, operands=tuple(name for name in OPTIONAL if name in operands))


def _has_one_diagonal(spec: AttentionSpec, sizes: Sizes, ring: Ring | None) -> bool:
    """Whether top left and bottom right are the same alignment, as every row has as many keys as queries."""
    if spec.paged or ring is not None or not {"q_lengths", "kv_lengths"}.isdisjoint(spec.operands):
        return False
    return spec.same_offsets if spec.packed else same_dim(sizes.rows, sizes.keys)


def _add(
    mask: Mask,
    window: dict[str, Data],
    spec: AttentionSpec,
    operands: Operands,
    ring: Ring | None,
    sizes: Sizes,
) -> AttentionSpec:
    leaves, tree = jax.tree.flatten((mask.conditions, window))
    of_mask = {n: x for n, x in enumerate(leaves) if isinstance(x, Array)}
    of_call = {name: operands[name] for name in _READ if name in operands}

    def made(arrays: tuple[dict[int, Array], Operands]) -> Operands:
        of_mask, of_call = arrays
        if sizes.keys is None:  # rows read by index what their sequence has
            of_mask = _jax.whole_beside_manual(of_mask, [n for n, x in of_mask.items() if x.ndim])
            of_call = _jax.whole_beside_manual(of_call, [*of_call])
        conditions, window = jax.tree.unflatten(tree, [of_mask.get(n, x) for n, x in enumerate(leaves)])
        ring_axes = () if ring is None else ring.axes
        conditions = merged(conditions, ring_axes)
        found = _made(conditions, spec, _rows(spec, operands | of_call, ring), of_call, sizes, ring_axes)
        return found | {name: bands.operand(x) for name, x in window.items()}

    def shardings(shapes: Any) -> dict[str, NamedSharding]:
        return {name: _sharding(spec, operands, name, x.shape) for name, x in shapes.items()}

    operands |= _jax.in_automatic_axes(made, (of_mask, of_call), shardings)
    if "ranges" in operands:
        spec = replace(spec, reach=conjunctions.reach_of(mask.conditions))
    return spec


def _made(
    conditions: tuple[Form, ...],
    spec: AttentionSpec,
    rows: Rows,
    operands: Operands,
    sizes: Sizes,
    ring_axes: tuple[str, ...],
) -> Operands:
    """The operands by which a mask reaches the call."""
    found: Operands = {}
    visible = conjunctions.resolve(conditions, rows)
    blocks, array, pairs = visible.blocks, visible.dense, visible.pairs
    shown = None if blocks is None else _block_mask(blocks, rows, sizes)
    if array is not None and sizes.keys is not None:
        found["mask"] = array.seen
    elif array is not None:
        shown = elements.block_mask(array, blocks, shown, spec, rows, sizes)
        if spec.block[1] == 1:
            hull = [elements.hull_of(shown, spec.block, rows)]
            pairs = tuple(conjunctions.intersection(pairs, hull) if pairs else hull)
    if shown is not None:
        found["block_mask"] = shown
    if pairs:
        whole = jnp.zeros((1, 1, sizes.rows), jnp.int32)
        limits = jnp.broadcast_arrays(whole, *(x for pair in pairs for x in pair))
        ranges = jnp.stack(limits[1:], -1)
        found["ranges"] = ranges[0] if sizes.packed else ranges
    if visible.segments is not None:
        found |= _segments(operands, visible.segments, sizes, ring_axes)
    return found


def _block_mask(blocks: forms.Blocks, rows: Rows, sizes: Sizes) -> Array:
    shown = blocks.shown(-(-sizes.columns // blocks.block[1]))
    if rows.whole is not None:  # a ring's calls select their blocks from those of all devices
        shown = jnp.swapaxes(rows.whole(jnp.swapaxes(shown, 2, 3)), 2, 3)
    if shown.shape[1] == sizes.kv_heads > 1:
        shown = jnp.repeat(shown, sizes.heads // sizes.kv_heads, 1)
    return shown


def _segments(operands: Operands, ids: forms.Segments, sizes: Sizes, ring_axes: tuple[str, ...]) -> Operands:
    q = jnp.broadcast_to(ids.q_ids, (sizes.batch, sizes.rows))
    k = jnp.broadcast_to(ids.kv_ids, (sizes.batch, ids.kv_ids.shape[-1]))
    if "q_segment_ids" in operands:
        given = forms.Segments(operands["q_segment_ids"], operands["kv_segment_ids"])
        both = both_segments(ring_axes, given, forms.Segments(q, k))
        q, k = both.q_ids, both.kv_ids
    return {"q_segment_ids": q, "kv_segment_ids": k}


def _sharding(spec: AttentionSpec, operands: Operands, name: str, shape: tuple[Any, ...]) -> NamedSharding:
    """The explicit sharding of a mask's operand: along the dimensions that query and key have, theirs."""
    of_dim: dict[str, Any] = {}
    for source in ("key", "query"):
        sharding = jax.typeof(operands[source]).sharding
        of_dim |= zip(spec.dims[source], sharding.spec)
    dims = zip(spec.dims[name], shape)
    entries = [None if same_dim(size, 1) else of_dim.get(dim.rstrip("*")) for dim, size in dims]
    return NamedSharding(sharding.mesh, PartitionSpec(*entries))


# --- rows ----------------------------------------------------------------------------------------------------------


def _sizes(spec: AttentionSpec, operands: Operands, ring: Ring | None) -> Sizes:
    heads, tokens = operands["query"].shape[-2], operands["query"].shape[-3]
    kv_heads = operands["key"].shape[spec.dims["key"].index("hk")]
    if spec.paged:
        columns = _capacity(spec, operands)
    else:
        columns = operands["key"].shape[-3] * (1 if ring is None else ring.size)
    if spec.packed:
        n = operands["cu_seqlens_q"].shape[0] - 1
        return Sizes(n, heads, kv_heads, tokens, columns, packed=True, pages=spec.paged)
    keys = None if spec.paged else operands["key"].shape[1]
    chunk = None if ring is None else tokens // 2 if ring.order == "zigzag" else tokens
    return Sizes(
        operands["query"].shape[0], heads, kv_heads, tokens, columns, keys, pages=spec.paged, chunk=chunk
    )


def _capacity(spec: AttentionSpec, operands: Operands) -> Any:
    """Keys that the pages of a sequence can hold."""
    page_size = operands["key"].shape[spec.dims["key"].index("ps")]
    return gather.table_capacity(operands["block_tables"], page_size)


def _rows(spec: AttentionSpec, operands: Operands, ring: Ring | None) -> Rows:
    if spec.paged:
        return _paged_rows(operands, _capacity(spec, operands))
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

    def of_all_devices(x: Array) -> Array:
        every = gathered(x, ring.axes, x.ndim - 1)
        return zigzag_unpermute(every, n, x.ndim - 1) if ring.order == "zigzag" else every

    lengths, keys = (jnp.full((1, 1), n * s, jnp.int32) for s in (sq, sk))
    return Rows(index[None].astype(jnp.int32), lengths, keys, whole=of_all_devices)


def _varlen_rows(operands: Operands) -> Rows:
    """The rows of packed sequences with packed keys."""
    tokens = operands["key"].shape[0]
    starts = offsets.starts_of(operands["cu_seqlens_k"], tokens)
    keys = jnp.diff(starts)
    if "kv_lengths" in operands:
        keys = jnp.clip(operands["kv_lengths"], 0, keys)
    token = jnp.arange(tokens, dtype=jnp.int32)
    owner = offsets.owners(starts, token)
    place = token - starts[owner]
    used = (owner >= 0) & (place < jnp.pad(keys, (0, 1))[owner])
    rows = _packed_rows(operands, keys)
    return replace(rows, packed_keys=PackedKeys(starts[rows.sequence][None], owner, used))


def _paged_rows(operands: Operands, capacity: Any) -> Rows:
    """The rows of sequences whose keys are in pages; each sequence has room for `capacity` keys."""
    keys = jnp.clip(operands["kv_lengths"], 0, capacity)
    owner = jnp.arange(keys.shape[0], dtype=jnp.int32)[:, None]
    place = jnp.arange(capacity, dtype=jnp.int32)
    used, owners = (place[None] < keys[:, None]).reshape(-1), jnp.repeat(owner, capacity, 1).reshape(-1)
    if "cu_seqlens_q" in operands:
        rows = _packed_rows(operands, keys)
        assert rows.sequence is not None
        start = jnp.minimum(rows.sequence, keys.shape[0] - 1)[None] * capacity
    else:
        rows = replace(Rows.fixed(operands["query"].shape[1], 0), keys=keys[:, None])
        start = owner * capacity
    return replace(rows, packed_keys=PackedKeys(start, owners, used))


def _packed_rows(operands: Operands, keys: Array) -> Rows:
    sequence, row, rows = offsets.locate(operands["cu_seqlens_q"], operands["query"].shape[0])
    keys = jnp.pad(keys, (0, 1))[sequence]  # the padding is needed if there is no sequence at all
    outside = operands["cu_seqlens_q"].shape[0] - 1  # a sequence of their own, which no span reaches
    return Rows(row[None], rows[None], keys[None], jnp.where(row < 0, outside, sequence))


# --- checks --------------------------------------------------------------------------------------------------------


def require_mask(check: Checker, mask: Any) -> Mask:
    """Checks the argument `mask` for layouts that only take values of jax_flash.masks."""
    if isinstance(mask, Mask):
        return mask
    got = f"{type(mask).__name__}; boolean arrays are for flash_attention"
    if is_function(mask):
        got = function_text(mask)
    raise check.fail(f"mask must be a value of jax_flash.masks, got {got}", TypeError)
