"""Transfers between the devices of a ring."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jax import Array, lax

from ..spec import Ring


def send(x: Array, ring: Ring, route: Sequence[tuple[int, int]]) -> Array:
    """lax.ppermute over pairs (from, to) of devices of the ring; zeros where nothing arrives.

    lax.ppermute numbers devices in the mesh's order, whatever the order of its axes, or refuses another one.
    """
    axes = ring.mesh_axes or ring.axes
    sizes = [lax.axis_size(axis) for axis in axes]
    number = np.arange(ring.size).reshape(sizes).transpose([axes.index(axis) for axis in ring.axes]).ravel()
    sent: Array = lax.ppermute(x, axes, [(int(number[a]), int(number[b])) for a, b in route])
    return sent


def gathered(x: Array, axes: Sequence[str], axis: int) -> Array:
    """The arrays of all devices along mesh axes, joined along `axis`. XLA gathers along no dimension without
    elements."""
    if x.shape[axis] == 0:
        return x
    every: Array = lax.all_gather(x, tuple(axes), axis=axis, tiled=True)
    return every
