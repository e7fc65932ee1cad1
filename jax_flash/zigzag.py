"""Zigzag order permutes a sequence so that equal shards have equal work under a causal mask.

The sequence is cut into 2·n chunks for n devices, and device i holds chunks i and 2n − 1 − i. Under a causal mask an
early chunk sees few keys and a late one many, so each device's pair sees about the same number.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .checker import Checker
from .options import ArrayLike


def zigzag_permute(x: ArrayLike, devices: int, axis: int = 1) -> jax.Array:
    """A global array in zigzag order: its shards along `axis` are those that `ring_attention(order="zigzag")` takes.

    Device i of n holds chunks i and 2n − 1 − i of the 2n equal chunks of the sequence, in this order. Permute tokens,
    targets, positions and segment ids once, before the model: all that works token by token needs no other change.

    Args:
      x: an array, or values on the host, whose dimension `axis` is the sequence.
      devices: size of the mesh axis that the sequence is sharded over.
      axis: the sequence's dimension.

    Returns:
      An array of x's shape and dtype.

    Raises:
      ValueError: if the length is not a multiple of 2·devices.

    Source: Zhu, ring-flash-attention (2024); Dubey et al., The Llama 3 Herd of Models (2024).

    Example:
      >>> tokens = jax.device_put(zigzag_permute(tokens, 8), NamedSharding(mesh, P("data", "sequence")))
    """
    return _permuted("zigzag_permute", x, devices, axis)


def zigzag_unpermute(x: ArrayLike, devices: int, axis: int = 1) -> jax.Array:
    """The inverse of `zigzag_permute`: an array in zigzag order, put back into the order of the sequence.

    Args and errors are those of `zigzag_permute`.

    Example:
      >>> logits = zigzag_unpermute(logits, 8)
    """
    chunks, at = _chunks("zigzag_unpermute", x, devices, axis)
    pairs = chunks.reshape(*chunks.shape[:at], int(devices), 2, *chunks.shape[at + 1 :])
    first, second = (jnp.take(pairs, i, at + 1) for i in (0, 1))
    return jnp.concatenate([first, jnp.flip(second, at)], at).reshape(np.shape(x))


def zigzag_positions(length: int, devices: int) -> jax.Array:
    """The positions in the sequence, int32 `[length]`, of the tokens of an array in zigzag order.

    Pass them to `apply_rotary`, sharded like the tokens.

    Raises:
      ValueError: if the length is not a multiple of 2·devices.

    Example:
      >>> positions = zigzag_positions(q.shape[1], 8)
      >>> q = apply_rotary(q, positions, cos, sin)
    """
    check = Checker("zigzag_positions")
    length = check.whole("length", length, least=0)
    _cut(check, f"length is {length}", length, devices)
    return _permuted(check.op, np.arange(length, dtype=np.int32), devices, 0)


def _permuted(op: str, x: Any, devices: int, axis: int) -> jax.Array:
    chunks, at = _chunks(op, x, devices, axis)  # […, 2n, chunk, …]
    first, second = jnp.split(chunks, 2, at)
    return jnp.stack([first, jnp.flip(second, at)], at + 1).reshape(np.shape(x))


def _cut(check: Checker, given: str, length: int, devices: int) -> tuple[int, int]:
    """The numbers of chunks and of elements in each. `given` says in messages what the length is."""
    devices = check.whole("devices", devices, least=1)
    if length % (2 * devices):
        raise check.fail(f"{given}, not a multiple of 2 · {devices} devices")
    return 2 * devices, length // (2 * devices)


def _chunks(op: str, x: Any, devices: int, axis: int) -> tuple[jax.Array, int]:
    """x with its dimension `axis` reshaped to [2·devices, chunk], and the index of the first of these two."""
    check = Checker(op)
    array = check.array("x", x)
    axis = check.whole("axis", axis)
    if not -array.ndim <= axis < array.ndim:
        raise check.fail(f"axis is {axis}, which an array of shape {array.shape} does not have")
    axis %= array.ndim
    length = array.shape[axis]
    cut = _cut(check, f"x has length {length} along axis {axis}", length, devices)
    return array.reshape(*array.shape[:axis], *cut, *array.shape[axis + 1 :]), axis
