"""Conditions of masks that become one: those that hold together, and those of which either holds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from typing import cast

import jax
import jax.numpy as jnp
from jax import Array

from .._jax import equally_varying, in_automatic_axes, manual_axes, same_dim
from ..sequence.transfer import gathered
from . import forms
from .forms import Form

_OF_ARRAYS = "b|1, hq|1, sq|1, sk|1"
_OF_CHOSEN = "b|1, h|1, rows"


def merged(conditions: Sequence[Form], ring_axes: Sequence[str] | None = None) -> tuple[Form, ...]:
    """A conjunction with at most one condition on segments, one on blocks and one dense array.

    `ring_axes`: those of the call, none if it is no ring. Without a call, conditions on segments inside shard_map are
    left apart, because the call may be a ring.
    """
    rest = [x for x in conditions if not isinstance(x, (forms.Segments, forms.Blocks, forms.Dense))]
    by_segment = [x for x in conditions if isinstance(x, forms.Segments)]
    by_block = [x for x in conditions if isinstance(x, forms.Blocks)]
    arrays = [x for x in conditions if isinstance(x, forms.Dense)]
    if ring_axes is None and manual_axes()[0]:
        rest += by_segment
    elif by_segment:
        rest.append(reduce(partial(both_segments, ring_axes or ()), by_segment))
    if by_block:
        rest.append(reduce(_both_blocks, by_block))
    if arrays:
        rest.append(reduce(_both_arrays, arrays))
    return tuple(rest)


def joined(a: Form, b: Form) -> Form | None:
    """The keys that either of two conditions shows, if they are not made of ranges; None if there is no such form."""
    if isinstance(a, forms.Dense) and isinstance(b, forms.Dense):
        x, y = _of_one_shape("dense(…) | dense(…)", "arrays", _OF_ARRAYS, 4, a.seen, b.seen)
        # Past the rows and keys of one array, another that has one for all may show more.
        alike = a.by_sequence is b.by_sequence and all(map(same_dim, x.shape[2:], y.shape[2:]))
        return forms.Dense(x | y, a.by_sequence if alike else None)
    if isinstance(a, forms.Blocks) and isinstance(b, forms.Blocks) and a.block == b.block:
        both = _of_one_shape("blocks(…) | blocks(…)", "chosen", _OF_CHOSEN, 4, a.chosen, b.chosen)
        lead = jnp.broadcast_shapes(*(x.shape[:-1] for x in both))
        both = [jnp.broadcast_to(x, (*lead, x.shape[-1])) for x in both]
        other = jnp.where(_among(both[1], both[0]), -1, both[1])
        return forms.Blocks(jnp.concatenate([both[0], other], -1), a.block)
    return None


def _of_one_shape(masks: str, name: str, dims: str, rank: int, *arrays: Array) -> list[Array]:
    """The arrays with `rank` dimensions. Raises unless `dims`, the first of these, agree; those with `|1` may also be 1
    in one of the arrays."""
    found = [forms.with_rank(x, rank) for x in arrays]
    each = dims.split(", ")
    of_x, of_y = (x.shape[: len(each)] for x in found)
    for dim, m, n in zip(each, of_x, of_y):
        if not (same_dim(m, n) or (dim.endswith("|1") and (same_dim(m, 1) or same_dim(n, 1)))):
            raise ValueError(f"masks: {masks} must have {name} [{dims}] of one shape, got {of_x} and {of_y}")
    return found


def _both_arrays(a: forms.Dense, b: forms.Dense) -> forms.Dense:
    x, y = _of_one_shape("dense(…) & dense(…)", "arrays", _OF_ARRAYS, 4, a.seen, b.seen)
    return forms.Dense(x & y, a.by_sequence if a.by_sequence is b.by_sequence else None)


def _both_blocks(a: forms.Blocks, b: forms.Blocks) -> forms.Blocks:
    """The blocks that both conditions show."""
    if a.block != b.block:
        raise ValueError(
            f"masks: blocks(…) & blocks(…) must have blocks of one size, got {a.block} and {b.block}; "
            "masks.dense(…) takes any mask"
        )
    x, y = _of_one_shape("blocks(…) & blocks(…)", "chosen", _OF_CHOSEN, 4, a.chosen, b.chosen)
    return forms.Blocks(jnp.where(_among(x, y), x, -1), a.block)


def _among(chosen: Array, others: Array) -> Array:
    """Which of the chosen blocks are among the others of the same rows."""
    return (chosen[..., :, None] == others[..., None, :]).any(-1)


def both_segments(ring_axes: Sequence[str], a: forms.Segments, b: forms.Segments) -> forms.Segments:
    """Ids that are equal where both ids are equal: numbers of the pairs of ids, in a ring of those of all devices."""

    def of_all_devices(x: Array) -> Array:
        return gathered(equally_varying({"x": x}, ring_axes)["x"], ring_axes, 1)

    def pairs(name: str, x: Array, y: Array) -> Array:
        both = _of_one_shape("segments(…) & segments(…)", name, "b|1, s|1", 2, x, y)
        return jnp.stack(jnp.broadcast_arrays(*both), -1)

    def number(x: Array) -> Array:
        order = jnp.lexsort((x[:, 1], x[:, 0]))
        sorted_ = x[order]
        new = jnp.concatenate([jnp.zeros(1, bool), (sorted_[1:] != sorted_[:-1]).any(-1)])
        return jnp.zeros(x.shape[0], jnp.int32).at[order].set(jnp.cumsum(new, dtype=jnp.int32))

    def numbered(both: tuple[forms.Segments, forms.Segments]) -> forms.Segments:
        a, b = both
        rows, keys = pairs("q_ids", a.q_ids, b.q_ids), pairs("kv_ids", a.kv_ids, b.kv_ids)
        shapes = rows.shape[:2], keys.shape[:2]
        # Where rows or keys belong to all entries, these are numbered together.
        if not same_dim(shapes[0][0], shapes[1][0]):
            rows, keys = rows.reshape(1, -1, 2), keys.reshape(1, -1, 2)
        own = jnp.concatenate([rows, keys], 1)
        every = jnp.concatenate([own, of_all_devices(own)], 1) if ring_axes else own
        numbers = jax.vmap(number)(every)[:, : own.shape[1]]
        q, k = numbers[:, : rows.shape[1]], numbers[:, rows.shape[1] :]
        return forms.Segments(q.reshape(shapes[0]), k.reshape(shapes[1]))

    def shardings(shapes: forms.Segments) -> forms.Segments:
        found = []
        for name in ("q_ids", "kv_ids"):
            arrays, shape = (getattr(a, name), getattr(b, name)), getattr(shapes, name).shape
            whole = [x for x in arrays if all(map(same_dim, x.shape, shape))] or arrays
            found.append(jax.typeof(whole[0]).sharding)
        return forms.Segments(*found)

    return cast("forms.Segments", in_automatic_axes(numbered, (a, b), shardings))
