"""`flops`: the floating-point operations of a call, over its visible pairs of a query and a key."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np

from . import dot_product, validate
from .attention import flash_attention
from .dot_product import dot_product_attention
from .paged import validate as paged_validate
from .paged.attention import paged_attention
from .spec import UNLIMITED, AttentionSpec
from .varlen import flash_attention_varlen

Pass = Literal["forward", "backward", "tangent"]
Shapes = Mapping[str, tuple[int, ...]]
Values = Mapping[str, np.ndarray]

_SPEC_OF: dict[Callable[..., Any], Callable[..., tuple[AttentionSpec, Any]]] = {
    flash_attention: validate.fixed,
    flash_attention_varlen: validate.varlen,
    paged_attention: paged_validate.attention,
    dot_product_attention: dot_product.spec_and_operands,
}
# How many products along d and along dv each pass computes for a visible pair.
_PRODUCTS = {
    "forward": (1, 1),  # q·k; p·v
    "backward": (3, 2),  # q·k, ds·k and ds·q; do·v and p·do
    "tangent": (3, 2),  # q·k, tq·k and q·tk; p·tv and (p∘ds)·v
    "bias_gradient": (1, 1),  # q·k; do·v
}


def flops(function: Callable[..., Any], /, *arguments: Any, of: Pass = "forward", **options: Any) -> int:
    """The number of floating-point operations of a call, two for each multiplication and addition.

    Counted are the matrix products over visible pairs of a query and a key: 2·(d + dv) for each pair and query head in
    the forward pass, 2·(3d + 2dv) in the backward and in the tangent pass (`jax.jvp`). What causal, window, lengths,
    segments, mask, draft_mask or a bias of −inf hide counts for nothing, and neither do softmax, dropout and the like.

    Args:
      function: `flash_attention`, `flash_attention_varlen`, `paged_attention` or `dot_product_attention`.
      *arguments, **options: those of the call. Any array may be a `jax.ShapeDtypeStruct`. The values of lengths,
        offsets, segment_ids, masks and bias count where they are known: on the host, or in arrays of JAX that are not
        traced, which are copied from their device. Where only the shape is known, lengths are full, packed tokens are
        divided evenly among the sequences, and segment_ids, masks and bias hide nothing.
      of: `"forward"`, `"backward"` (without the forward pass before it) or `"tangent"`.

    Returns:
      The exact number, as a Python int.

    Raises:
      ValueError, TypeError: as in the call, for wrong arguments.

    Example:
      >>> x = jax.ShapeDtypeStruct((8, 4096, 16, 128), jnp.bfloat16)
      >>> flops(flash_attention, x, x, x, causal=True)
      549890031616
    """
    if function not in _SPEC_OF:
        names = ", ".join(known.__name__ for known in _SPEC_OF)
        raise TypeError(f"flops: function is {function!r}; allowed are {names}")
    if of not in ("forward", "backward", "tangent"):
        raise ValueError(f'flops: of is {of!r}; allowed are "forward", "backward" and "tangent"')
    given = _given(function, *arguments, **options)
    spec, shapes = _spec_and_shapes(function, given)
    return count(of, spec, shapes, _known_values(given, shapes))


def count(pass_: str, spec: AttentionSpec, shapes: Shapes, values: Values) -> int:
    """The FLOP of a pass from its operands' shapes, without leading dimensions, and those values that are known."""
    along_d, along_dv = _PRODUCTS[pass_]
    d, dv = shapes["query"][-1], spec.value_dim or shapes["value"][-1]
    return 2 * (along_d * d + along_dv * dv) * visible_pairs(spec, shapes, values)


def visible_pairs(spec: AttentionSpec, shapes: Shapes, values: Values) -> int:
    """The pairs (query, key) over which attention is computed, of all batch entries and query heads."""
    heads = shapes["query"][-2]
    sizes = _sizes(spec, shapes, values)
    if "draft_mask" in values:
        masks = np.broadcast_to(values["draft_mask"], (len(sizes), *values["draft_mask"].shape[1:]))
        return heads * sum(_in_band(spec, *x) - _in_drafts(spec, x, ~m) for x, m in zip(sizes, masks))
    if not values.keys() & {"mask", "bias", "q_segment_ids"}:
        return heads * sum(times * _in_band(spec, *size) for size, times in Counter(sizes).items())
    if "mask" not in values and "bias" not in values:
        return heads * sum(_in_segments(spec, size, *ids) for size, ids in zip(sizes, _segments(values)))
    return sum(_in_mask(spec, size, heads, entry, values) for entry, size in enumerate(sizes))


def spec_and_shapes(
    function: Callable[..., Any], *arguments: Any, **options: Any
) -> tuple[AttentionSpec, Shapes]:
    """The spec and the operands' shapes of a call, checked as in the call; arrays may be `jax.ShapeDtypeStruct`s."""
    return _spec_and_shapes(function, _given(function, *arguments, **options))


def _given(function: Callable[..., Any], *arguments: Any, **options: Any) -> dict[str, Any]:
    """The arguments of a call by name, with the defaults."""
    given = inspect.signature(function).bind(*arguments, **options)
    given.apply_defaults()
    return given.arguments


def _spec_and_shapes(function: Callable[..., Any], given: Mapping[str, Any]) -> tuple[AttentionSpec, Shapes]:
    """The call's spec and its operands' shapes, checked as in the call; no array is computed or moved."""
    leaves, structure = jax.tree.flatten(dict(given), is_leaf=lambda x: x is None)
    arrays = {n: x for n, x in enumerate(leaves) if hasattr(x, "shape") and not _host_integers(x)}
    specs = []

    def run(arrays: dict[int, Any]) -> Any:
        arguments = jax.tree.unflatten(structure, [arrays.get(n, x) for n, x in enumerate(leaves)])
        spec, operands = _SPEC_OF[function](function.__name__, arguments)
        specs.append(spec)
        return operands

    operands = jax.eval_shape(run, arrays)
    return specs[0], {name: x.shape for name, x in operands.items()}


def _host_integers(x: Any) -> bool:
    """Whether x is an index array on the host, whose values the checks read."""
    return isinstance(x, (np.ndarray, np.generic)) and x.dtype.kind in "iu"


def _known_values(given: Mapping[str, Any], shapes: Shapes) -> Values:
    """The values of the operands that decide which pairs are visible, as far as they are known, by name."""
    names = ("q_lengths", "kv_lengths", "cu_seqlens_q", "mask", "bias", "draft_mask")
    found = {name: given.get(name) for name in names}
    for name, of_jax_nn in (("q_lengths", "query_seq_lengths"), ("kv_lengths", "key_value_seq_lengths")):
        found[name] = given.get(of_jax_nn, found[name])
    if "cu_seqlens_k" in shapes:
        offsets = given["cu_seqlens_k"]
        found["cu_seqlens_k"] = given["cu_seqlens_q"] if offsets is None else offsets
    ids = given.get("segment_ids")
    pair = ids if isinstance(ids, (tuple, list)) else (ids, ids)
    if all(map(_is_known, pair)):
        found |= zip(("q_segment_ids", "kv_segment_ids"), pair)
    values = {}
    for name, x in found.items():
        if _is_known(x):
            array = np.asarray(x)
            values[name] = array.reshape((1,) * (len(shapes[name]) - array.ndim) + array.shape)
    return values


def _is_known(x: Any) -> bool:
    return not (x is None or isinstance(x, (jax.ShapeDtypeStruct, jax.core.Tracer)))


def _sizes(spec: AttentionSpec, shapes: Shapes, values: Values) -> list[tuple[int, int]]:
    """The rows and keys in use of each batch entry or sequence."""
    query, key = shapes["query"], shapes["key"]
    if "cu_seqlens_q" in shapes:
        rows = _differences("cu_seqlens_q", query[0], shapes, values)
    else:
        rows = _lengths("q_lengths", query[0], query[1], values)
    if spec.paged:
        n, pages = shapes["block_tables"]
        keys = _lengths("kv_lengths", n, pages * key[spec.dims["key"].index("ps")], values)
    elif "cu_seqlens_k" in shapes:
        keys = _differences("cu_seqlens_k", key[0], shapes, values)
        used = _lengths("kv_lengths", len(keys), key[0], values)
        keys = [min(*pair) for pair in zip(keys, used)]
    else:
        keys = _lengths("kv_lengths", key[0], key[1], values)
    return list(zip(rows, keys, strict=True))


def _lengths(name: str, entries: int, size: int, values: Values) -> list[int]:
    if name not in values:
        return [size] * entries
    return [min(max(int(x), 0), size) for x in np.broadcast_to(values[name], (entries,))]


def _differences(name: str, tokens: int, shapes: Shapes, values: Values) -> list[int]:
    """The lengths of packed sequences; the tokens divided evenly where their offsets are not known."""
    if name in values:
        offsets = np.maximum.accumulate(np.clip(values[name].astype(np.int64), 0, tokens))
        return [int(x) for x in np.diff(offsets)]
    n = shapes[name][0] - 1
    return [tokens // n + (i < tokens % n) for i in range(n)]


def _rows(spec: AttentionSpec, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The first key that each row sees by its position, and the one past the last."""
    rows, keys = size
    diagonal = np.arange(rows, dtype=np.int64) + (keys - rows if spec.align == "bottom_right" else 0)
    first = np.zeros_like(diagonal) if spec.left == UNLIMITED else np.maximum(diagonal - spec.left, 0)
    past = np.full_like(diagonal, keys)
    if spec.right != UNLIMITED:
        past = np.minimum(diagonal + spec.right + 1, keys)
    return first, np.maximum(past, first)


def _in_band(spec: AttentionSpec, rows: int, keys: int) -> int:
    if spec.left == spec.right == UNLIMITED:
        return rows * keys
    first, past = _rows(spec, (rows, keys))
    return int((past - first).sum())


def _in_drafts(spec: AttentionSpec, size: tuple[int, int], hidden: np.ndarray) -> int:
    """The pairs of the band that a draft mask hides from a sequence."""
    rows, keys = size
    if rows > len(hidden):
        return 0
    first, past = _rows(spec, size)
    token = np.arange(keys - rows, keys)
    in_band = (token >= first[:, None]) & (token < past[:, None])
    return int((in_band & hidden[:rows, :rows]).sum())


def _segments(values: Values) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return zip(values["q_segment_ids"], values["kv_segment_ids"])


def _in_segments(spec: AttentionSpec, size: tuple[int, int], q_ids: np.ndarray, kv_ids: np.ndarray) -> int:
    """The visible pairs of a batch entry; keys are sorted by segment, and by position within each."""
    rows, keys = size
    names, segment = np.unique(kv_ids[:keys], return_inverse=True)
    sorted_keys = np.sort(segment.astype(np.int64) * (keys + 1) + np.arange(keys))
    own = np.searchsorted(names, q_ids[:rows])
    exists = np.append(names, 0)[own] == q_ids[:rows]
    exists &= own < len(names)
    first, past = (np.searchsorted(sorted_keys, own * (keys + 1) + x) for x in _rows(spec, size))
    return int((past - first)[exists].sum())


def _in_mask(spec: AttentionSpec, size: tuple[int, int], heads: int, entry: int, values: Values) -> int:
    """The visible pairs of a batch entry and all heads, from the whole picture of one head after another."""
    rows, keys = size
    first, past = _rows(spec, size)
    column = np.arange(keys)
    picture = (column >= first[:, None]) & (column < past[:, None])
    if "q_segment_ids" in values:
        q_ids, kv_ids = values["q_segment_ids"][entry], values["kv_segment_ids"][entry]
        picture &= q_ids[:rows, None] == kv_ids[:keys]
    hides = [values["mask"]] if "mask" in values else []
    hides += [values["bias"] != -np.inf] if "bias" in values else []
    different = heads if any(x.shape[1] > 1 for x in hides) else 1
    total = 0
    for head in range(different):
        seen = picture
        for x in hides:
            x = x[entry if x.shape[0] > 1 else 0, head if x.shape[1] > 1 else 0]
            seen = seen & x[: rows if x.shape[0] > 1 else 1, : keys if x.shape[1] > 1 else 1]
        total += int(seen.sum())
    return total * heads // different
