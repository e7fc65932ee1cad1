"""`flops`: the floating-point operations of a call, over its visible pairs of a query and a key."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from . import dot_product, validate
from ._jax import manual_axes
from .attention import flash_attention
from .checker import Checker
from .dot_product import DotProductArguments, dot_product_attention
from .masks import Mask
from .operands import WINDOW
from .options import FixedArguments, PagedArguments, RingArguments, VarlenArguments
from .paged import validate as paged_validate
from .paged.attention import paged_attention
from .ring import ring_attention
from .spec import UNLIMITED, AttentionSpec
from .varlen import flash_attention_varlen
from .visible import operands as mask_operands
from .visible.pairs import Shapes, Values, count, keys_of_entry

_CHECK = Checker("flops")
Pass = Literal["forward", "backward", "tangent"]


def _whole_ring(op: str, arguments: RingArguments) -> tuple[AttentionSpec, Any]:
    """The flash_attention call that all devices of a ring compute together."""
    check = Checker(op)
    validate.ring_names(check, arguments)
    if manual_axes()[0]:
        raise check.fail("its whole sequence is not known inside jax.shard_map; count its operations outside")
    return validate.fixed(op, arguments)


# For each function: its checks, and the dataclass of its arguments.
_CHECKS: dict[Callable[..., Any], tuple[Callable[..., tuple[AttentionSpec, Any]], Callable[..., Any]]] = {
    flash_attention: (validate.fixed, FixedArguments),
    flash_attention_varlen: (validate.varlen, VarlenArguments),
    paged_attention: (paged_validate.attention, PagedArguments),
    dot_product_attention: (dot_product.spec_and_operands, DotProductArguments),
    ring_attention: (_whole_ring, RingArguments),
}


def flops(function: Callable[..., Any], /, *arguments: Any, of: Pass = "forward", **options: Any) -> int:
    """The number of floating-point operations of a call, two for each multiplication and addition.

    Counted are the matrix products over visible pairs of a query and a key: 2·(d + dv) for each pair and query head in
    the forward pass, 2·(3d + 2dv) in the backward and in the tangent pass (`jax.jvp`). What causal, window, lengths,
    segments, mask, draft_mask or a bias of −inf hide counts for nothing, and neither do softmax, dropout and the like.

    Args:
      function: `flash_attention`, `flash_attention_varlen`, `paged_attention`, `dot_product_attention`, or
        `ring_attention`, of which all devices together count: pass the whole sequence in its own order, and call this
        outside `jax.shard_map`.
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
    if not any(function is known for known in _CHECKS):  # an array has no hash
        names = ", ".join(known.__name__ for known in _CHECKS)
        given = getattr(function, "__name__", type(function).__name__)
        of_another = "a wrapper of " if hasattr(function, "__wrapped__") else ""  # such as jax.jit's
        raise TypeError(f"flops: function is {of_another}{given}; allowed are {names}")
    if of not in ("forward", "backward", "tangent"):
        raise ValueError(f'flops: of is {of!r}; allowed are "forward", "backward" and "tangent"')
    given = _given(function, *arguments, **options)
    spec, shapes = _spec_and_shapes(function, given)
    with jax.transfer_guard("allow"):  # the values that count are copied to the host, as the contract says
        return count(of, spec, shapes, _known_values(spec, given, shapes))


def spec_and_shapes(
    function: Callable[..., Any], *arguments: Any, **options: Any
) -> tuple[AttentionSpec, Shapes]:
    """The spec and the operands' shapes of a call, checked as in the call; arrays may be `jax.ShapeDtypeStruct`s."""
    return _spec_and_shapes(function, _given(function, *arguments, **options))


def _given(function: Callable[..., Any], *arguments: Any, **options: Any) -> dict[str, Any]:
    """The arguments of a call by name, with the defaults."""
    try:
        given = inspect.signature(function).bind(*arguments, **options)
    except TypeError as error:  # does not name the function
        raise Checker(function.__name__).fail(str(error), TypeError) from None
    given.apply_defaults()
    return given.arguments


def _spec_and_shapes(function: Callable[..., Any], given: Mapping[str, Any]) -> tuple[AttentionSpec, Shapes]:
    """The call's spec and its operands' shapes, checked as in the call; no array is computed or moved."""
    leaves, structure = jax.tree.flatten(dict(given), is_leaf=lambda x: x is None)
    arrays = {n: x for n, x in enumerate(leaves) if hasattr(x, "shape") and not _host_integers(x)}
    specs = []

    def run(arrays: dict[int, Any]) -> Any:
        arguments = jax.tree.unflatten(structure, [arrays.get(n, x) for n, x in enumerate(leaves)])
        check, value = _CHECKS[function]
        spec, operands = check(function.__name__, value(**arguments))
        specs.append(spec)
        return operands

    operands = jax.eval_shape(run, arrays)
    return specs[0], {name: x.shape for name, x in operands.items()}


def _host_integers(x: Any) -> bool:
    """Whether x is an index array on the host, whose values the checks read."""
    return isinstance(x, (np.ndarray, np.generic)) and x.dtype.kind in "iu"


def _known_values(spec: AttentionSpec, given: Mapping[str, Any], shapes: Shapes) -> Values:
    """The known values of the operands that decide which pairs are visible, by name."""
    names = ("q_lengths", "kv_lengths", "cu_seqlens_q", "mask", "bias", "draft_mask")
    found = {name: given.get(name) for name in names}
    for name, of_jax_nn in (("q_lengths", "query_seq_lengths"), ("kv_lengths", "key_value_seq_lengths")):
        found[name] = given.get(of_jax_nn, found[name])
    if "cu_seqlens_k" in shapes:
        offsets = given["cu_seqlens_k"]
        found["cu_seqlens_k"] = given["cu_seqlens_q"] if offsets is None else offsets
    pair = _CHECK.segment_pair(given.get("segment_ids"))
    if all(map(_is_known, pair)):
        found |= zip(("q_segment_ids", "kv_segment_ids"), pair)
    values = {}
    for name, x in found.items():
        if _is_known(x) and not isinstance(x, Mask):
            array = np.asarray(x)
            values[name] = array.reshape((1,) * (len(shapes[name]) - array.ndim) + array.shape)
    mask = given.get("mask")
    return _with_mask(mask, spec, shapes, values) if isinstance(mask, Mask) else values


def _with_mask(mask: Mask, spec: AttentionSpec, shapes: Shapes, values: dict[str, np.ndarray]) -> Values:
    """The values, with those of the operands that a mask makes if all that it depends on is known."""
    index = {"kv_lengths", "cu_seqlens_q", "cu_seqlens_k"} & shapes.keys()
    if "kv_lengths" in index - values.keys() and "cu_seqlens_k" not in shapes:
        values = values | {"kv_lengths": np.full(shapes["kv_lengths"], keys_of_entry(spec, shapes))}
    if not index <= values.keys() or not all(map(_is_known, jax.tree.leaves(mask))):
        return values
    made = ("ranges", "mask", "block_mask", "q_segment_ids", "kv_segment_ids", *WINDOW)
    operands: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items() if name not in made
    }
    for name, x in values.items():
        whole = np.broadcast_to(x, shapes[name])
        operands[name] = jnp.asarray(whole.astype(np.int32) if whole.dtype.kind in "iu" else whole)
    if spec.window_is_data:  # the spec's band is that of the mask already
        spec = replace(spec, left=UNLIMITED, right=UNLIMITED)
    mask_operands.apply(_CHECK, mask, spec, operands)
    return values | {name: np.asarray(operands[name]) for name in made if name in operands}


def _is_known(x: Any) -> bool:
    return not (x is None or isinstance(x, (jax.ShapeDtypeStruct, jax.core.Tracer)))
