"""The attention of MaxText's `AttentionOp`, to be set in its place:

    from maxtext.layers.attention_op import AttentionOp
    from jax_flash.compat import maxtext

    AttentionOp.apply_attention = maxtext.apply_attention

Every attention type, model mode and attention kernel of MaxText's configuration then runs here: MLA, sliding windows,
chunks, block diffusion, sinks, softcap, segment ids, images, decoding from its two caches, `record_max_logits`, and
context parallelism as a ring. `AttentionOp.cudnn_flash_attention = maxtext.cudnn_flash_attention` replaces
`attention=cudnn_flash_te` alone; Transformer Engine is not needed. The functions hold for MaxText 0.2.5.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from .. import masks
from ..attention import flash_attention
from ..checker import Checker
from ..masks import Mask
from ..options import Implementation
from ..ring import ring_attention
from .costs import warn_dense

_CHECK = Checker("maxtext.apply_attention")
_HIDDEN = -0.7 * float(np.finfo(np.float32).max)  # MaxText's DEFAULT_MASK_VALUE
_ACTIVE = 1  # MaxText's DECODING_ACTIVE_SEQUENCE_INDICATOR
_PADDING = -2  # for keys with negative ids, which MaxText hides
_TYPES = ("global", "local_sliding", "chunk", "mla", "compressed", "full", "block_diffusion")


def apply_attention(
    self: Any,
    query: Array,
    key: Any,
    value: Any,
    decoder_segment_ids: Array | None,
    segment_positions: Array | None = None,
    lengths: Array | None = None,
    model_mode: str = "train",
    use_ragged_attention: bool = False,
    previous_chunk: Any = None,
    bidirectional_mask: Any = None,
    sinks: Array | None = None,
    indexer_mask: Array | None = None,
    compressed_mask: Array | None = None,
    record_max_logits: bool = False,
    decoder_segment_ids_kv: Array | None = None,
    pad_kv_total: int = 0,
    compress_ratio: int = 0,
    *,
    qk_product_einsum: Any = None,
    wv_product_einsum: Any = None,
    implementation: Implementation | None = None,
) -> tuple[Array, Array | None, Array | None]:
    """`AttentionOp.apply_attention` with its arguments and meaning.

    Args:
      self: the AttentionOp, whose attention_type, sliding_window_size, chunk_attn_window_size, causal_block_size,
        attn_logits_soft_cap, config and mesh say what is computed. Its attention_kernel does not matter.
      query: `[b, sq, hq, d]`, which MaxText has scaled.
      key, value: `[b or 1, sk, hk, d]` and `[b or 1, sk, hk, dv]`, arrays or MaxText's quantised KVTensor, which are
        dequantised.
      decoder_segment_ids: `[b, sk]`; a query sees the keys of its own segment, and keys with a negative id are hidden.
        When decoding, it sees the keys whose id is 1.
      lengths: `[b]`, keys in use, with use_ragged_attention.
      previous_chunk: an array whose second dimension is the position of the first query.
      bidirectional_mask: `[b, sk]`, True for tokens of images: neighbours that are True see each other.
      sinks: `[hq]`, in the softmax's sum.
      indexer_mask: `[b, sq, sk]`, 0 where a query may attend. It stays dense, which gives a warning.
      compressed_mask: a mask of the last keys, which stays dense too, as do MoBA's blocks.
      record_max_logits: sets `self.max_logits` to the largest logit of each sequence and head, `[b, hq]`.
      qk_product_einsum, wv_product_einsum, pad_kv_total, compress_ratio: ignored; they steer MaxText's own products.
      implementation: as in `flash_attention`.

    Returns:
      `(out, None, None)` in training, with out `[b, sq, hq, dv]` in query's dtype. Otherwise `(out, lse, 1)`, where lse
      and 1, `[b, sq, hq, 1]`, are the maximum and the sum by which MaxText merges its two caches.

    Raises:
      NotImplementedError: for dropout, because MaxText's call does not say whether dropout is to be applied, and for
        batches in striped order (`context_parallel_reorder_strategy`).
      ValueError, TypeError: as in `flash_attention`.

    Deviations from MaxText: a query that sees nothing gives 0, and an image that lies in several segments is cut at
    their borders.
    """
    del qk_product_einsum, wv_product_einsum, pad_kv_total, compress_ratio
    kind = str(getattr(self.attention_type, "value", self.attention_type))
    if kind not in _TYPES:
        raise _CHECK.fail(f"attention_type is {kind!r}, allowed are {', '.join(_TYPES)}")
    if getattr(self, "dropout_rate", 0.0):
        raise _CHECK.fail(
            f"dropout_rate is {self.dropout_rate}, but a call does not say whether it is deterministic; set it to 0",
            NotImplementedError,
        )
    key, value = (_array(x, query) for x in (key, value))
    decoding = model_mode == "autoregressive"
    options: dict[str, Any] = dict(
        scale=1.0,
        softcap=getattr(self, "attn_logits_soft_cap", None),
        sinks=None if sinks is None else jnp.asarray(sinks, jnp.float32).reshape(-1),
        implementation=implementation,
    )
    if record_max_logits:
        options["return_max"] = True
    place = _Place(self, query, key, decoding, previous_chunk)
    if use_ragged_attention and decoding:
        options["kv_lengths"] = _ragged(lengths, decoder_segment_ids, query.shape[0])
    else:
        other = indexer_mask is not None or compressed_mask is not None or getattr(self.config, "moba", False)
        ids = _segments(decoder_segment_ids, decoder_segment_ids_kv, query.shape[0], decoding, place)
        if _balanced(self) and not decoding and previous_chunk is None and not other:
            if bidirectional_mask is None and kind != "block_diffusion":
                return _ring(self, kind, query, key, value, ids, segment_positions, options)
            other = True
        if other or kind == "compressed":
            options["mask"] = _dense(
                self, kind, query, key, decoder_segment_ids, model_mode, previous_chunk, bidirectional_mask,
                compressed_mask, segment_positions, decoder_segment_ids_kv, indexer_mask, place,
            )  # fmt: skip
        else:
            hides = kind in ("local_sliding", "chunk") and ids is not None
            if not decoding or hides:
                options |= _sparse(self, kind, place, bidirectional_mask)
            options["segment_ids"] = ids
    results = flash_attention(query, key, value, **options, return_lse=True)
    out, lse = results[:2]
    if record_max_logits:
        _record(self, results[2])
    if model_mode == "train":
        return out, None, None
    # If a row sees no key, its lse must be finite like MaxText's masks, or it would make the merged row NaN.
    maximum = jnp.maximum(lse, _HIDDEN).transpose(0, 2, 1)[..., None]
    return out, maximum, jnp.ones_like(maximum)


def cudnn_flash_attention(
    self: Any,
    query: Array,
    key: Array,
    value: Array,
    decoder_segment_ids: Array | None,
    segment_positions: Array | None,
    model_mode: str = "train",
    sinks: Array | None = None,
) -> Array:
    """`AttentionOp.cudnn_flash_attention`, Transformer Engine's, with its arguments.

    Arguments, errors and deviations are those of `apply_attention`.
    """
    result = apply_attention(
        self, query, key, value, decoder_segment_ids, segment_positions, None, model_mode, sinks=sinks
    )
    return result[0]


class _Place:
    """The position of the first query among the keys, and the positions of all queries."""

    def __init__(self, op: Any, query: Array, key: Array, decoding: bool, previous_chunk: Any):
        self.sq, self.sk = query.shape[1], key.shape[1]
        self.first = 0
        if previous_chunk is not None:
            self.first = previous_chunk.shape[1]
        elif decoding and self.sq == 1:
            self.first = self.sk - 1

    @property
    def rows(self) -> Array:
        return self.first + jnp.arange(self.sq, dtype=jnp.int32)


def _array(x: Any, query: Array) -> Array:
    """Keys or values in query's dtype, broadcast to query's batch."""
    array: Array = jnp.asarray(x.dequant() if hasattr(x, "dequant") else x, query.dtype)
    if array.shape[0] == 1 != query.shape[0]:
        array = jnp.broadcast_to(array, (query.shape[0], *array.shape[1:]))
    return array


def _ragged(lengths: Array | None, ids: Array | None, batch: int) -> Array:
    if lengths is None:
        if ids is None:
            raise _CHECK.fail("use_ragged_attention needs lengths or decoder_segment_ids, but both are None")
        lengths = jnp.sum(ids, axis=-1)
    return jnp.broadcast_to(lengths.astype(jnp.int32), (batch,))


def _segments(
    ids: Array | None, kv_ids: Array | None, batch: int, decoding: bool, place: _Place
) -> tuple[Array, Array] | None:
    """The segments of queries and keys. Keys with negative ids get a segment that no query has."""
    if ids is None:
        return None
    if decoding:
        keys = ids.astype(jnp.int32)
        rows = jnp.full((batch, place.sq), _ACTIVE, jnp.int32)
    else:
        keys = (ids if kv_ids is None else kv_ids).astype(jnp.int32)
        rows = ids.astype(jnp.int32)
        if rows.shape[1] != place.sq:  # these are the ids of all chunks so far
            rows = rows[:, place.first : place.first + place.sq]
        keys = jnp.where(keys < 0, _PADDING, keys)
        rows = jnp.where(rows < 0, _PADDING - 1, rows)
    return rows, jnp.broadcast_to(keys, (batch, place.sk))


def _sparse(op: Any, kind: str, place: _Place, images: Any) -> dict[str, Any]:
    """The mask without segments, as options of `flash_attention`."""
    if images is not None:
        return {"mask": _limits(op, kind, place) | _spans(images, place)}
    if kind == "full":
        return {}
    if place.first == 0 and kind in ("global", "mla", "local_sliding"):
        window = (_size("sliding_window_size", op) - 1, 0) if kind == "local_sliding" else None
        return dict(causal=True, window=window, align="top_left")
    return {"mask": _limits(op, kind, place)}


def _limits(op: Any, kind: str, place: _Place) -> Mask:
    """The mask as one range of keys for each query."""
    row = place.rows
    lo, hi = jnp.zeros_like(row), row + 1
    if kind == "full":
        hi = jnp.full_like(row, place.sk)
    elif kind == "local_sliding":
        lo = row - (_size("sliding_window_size", op) - 1)
    elif kind == "chunk":
        size = _size("chunk_attn_window_size", op)
        lo = row // size * size
    elif kind == "block_diffusion":
        size = _size("causal_block_size", op)
        hi = (row // size + 1) * size
    return masks.ranges(lo, hi)


def _spans(images: Array, place: _Place) -> Mask:
    """The tokens of the same image, as one range of keys for each query; no keys for a query that is text."""
    image = jnp.asarray(images).astype(bool)
    index = jnp.arange(image.shape[1], dtype=jnp.int32)
    text = ~image
    begin = jax.lax.cummax(jnp.where(text, index + 1, 0), axis=1)
    end = jax.lax.cummin(jnp.where(text, index, image.shape[1]), axis=1, reverse=True)
    rows = slice(place.first, place.first + place.sq)
    lo, hi = (jnp.where(image, x, 0)[:, None, rows] for x in (begin, end))
    return masks.ranges(lo, hi)


def _size(name: str, op: Any) -> int:
    size = getattr(op, name, None)
    if not isinstance(size, int) or size < 1:
        raise _CHECK.fail(f"{name} must be an int of at least 1 with this attention_type, got {size!r}")
    return size


def _dense(
    op: Any, kind: str, query: Array, key: Array, ids: Any, model_mode: str, previous_chunk: Any, images: Any,
    compressed: Any, positions: Any, kv_ids: Any, indexer: Any, place: _Place,
) -> Array:  # fmt: skip
    """The mask that MaxText's own functions apply, as a boolean array, for masks without a sparse form."""
    shape = (query.shape[0], query.shape[2], place.sq, place.sk)
    warn_dense(
        _CHECK,
        "the mask",
        f"attention_type {kind!r}, an indexer, MoBA, or load-balanced context parallelism with images or blocks has no "
        "sparse form",
        shape,
        "other attention types keep O(rows) numbers",
    )
    seen = jnp.ones((1, 1, 1, 1), bool)
    own = op.generate_attention_mask(
        query, key, ids, model_mode, previous_chunk, images, compressed_mask=compressed,
        segment_positions=positions, decoder_segment_ids_kv=kv_ids,
    )  # fmt: skip
    if own is not None:
        seen &= _visible(own, shape)
    if indexer is not None:
        seen &= _visible(indexer[:, None], shape)
    if getattr(op.config, "moba", False):
        seen &= _visible(op._generate_moba_mask(query, key, place.rows), shape)
    return seen


def _visible(additive: Array, shape: tuple[int, ...]) -> Array:
    """Where an additive mask `[b, (hk, hq / hk,) sq, sk]` hides nothing, as `[b, h, sq, sk]`."""
    seen = additive >= 0.5 * _HIDDEN
    if seen.ndim == 5 and seen.shape[1:3] != (1, 1):
        seen = jnp.broadcast_to(
            seen, (seen.shape[0], seen.shape[1], shape[1] // seen.shape[1], *seen.shape[3:])
        )
    return seen.reshape(seen.shape[0], -1, *seen.shape[-2:])


def _balanced(op: Any) -> bool:
    """Whether the sequence is split over devices in zigzag order, MaxText's DUAL_CHUNK_SWAP."""
    if getattr(op, "mesh", None) is None or not op._load_balanced_context_parallel():
        return False
    config = op.config
    strategy = str(getattr(config.context_parallel_reorder_strategy, "value", "auto"))
    automatic = config.packing and config.context_parallel_strategy == "ring" and "gpu" in config.hardware
    if strategy == "striped" or (strategy == "auto" and automatic):
        raise _CHECK.fail(
            "context_parallel_reorder_strategy is striped here; set it to dual_chunk_swap",
            NotImplementedError,
        )
    return True


def _ring(
    op: Any, kind: str, query: Array, key: Array, value: Array, ids: Any, positions: Any, options: dict[str, Any]
) -> tuple[Array, Array | None, Array | None]:  # fmt: skip
    """A call whose sequence is split over devices in zigzag order."""
    batch, heads, rows, _ = op._logical_to_mesh_axes(op.flash_axis_names_q)
    kv_heads = op._logical_to_mesh_axes(op.flash_axis_names_kv)[1]
    if kind == "chunk" and positions is not None:
        # MaxText's chunks count from each document's own first token.
        chunk = positions // _size("chunk_attn_window_size", op)
        both = (chunk, chunk) if ids is None else tuple(x * query.shape[1] + chunk for x in ids)
        ids = tuple(jnp.where(x < 0, x, y).astype(jnp.int32) for x, y in zip(ids or both, both))
    window = (_size("sliding_window_size", op) - 1, 0) if kind == "local_sliding" else None
    sinks = options.pop("sinks")
    operands: dict[str, Any] = dict(segment_ids=ids, sinks=sinks)
    specs = dict(
        segment_ids=(PartitionSpec(batch, rows),) * 2 if ids is not None else None,
        sinks=PartitionSpec(heads) if sinks is not None else None,
    )
    attend = partial(
        ring_attention, axis_name=rows, order="zigzag", causal=kind != "full", window=window, align="top_left",
        **options,
    )  # fmt: skip

    def local(q: Array, k: Array, v: Array, operands: dict[str, Any]) -> Any:
        return attend(q, k, v, **operands)

    q_spec, kv_spec = (PartitionSpec(batch, rows, x, None) for x in (heads, kv_heads))
    records = "return_max" in options
    found = jax.shard_map(
        local, mesh=op.mesh, in_specs=(q_spec, kv_spec, kv_spec, specs),
        out_specs=(q_spec, PartitionSpec(batch, heads)) if records else q_spec,
    )(query, key, value, operands)  # fmt: skip
    if records:
        _record(op, found[1])
    return found[0] if records else found, None, None


def _record(op: Any, largest: Array) -> None:
    """Stores the largest logits where MaxText's QK-clip reads them."""
    from flax import nnx

    op.max_logits = nnx.Intermediate(largest)
