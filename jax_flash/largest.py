"""The result of `return_max`: the largest row maximum of each sequence and head."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import _jax
from .offsets import starts_of
from .operands import FORWARD
from .options import Arguments
from .spec import AttentionSpec, result_names

_INF = float("inf")
_BLOCK = 128  # packed rows whose common maximum is taken first


def results(
    arguments: Arguments, spec: AttentionSpec, operands: dict[str, Array], found: tuple[Array, ...]
) -> Array | tuple[Array, ...]:
    """The results of a public function: out, and lse and the largest scores if they were asked for."""
    by_name = dict(zip(result_names(FORWARD, spec), found))
    wanted = [by_name["out"]]
    if arguments.return_lse:
        wanted.append(by_name["lse"])
    if spec.row_max:
        wanted.append(_largest(spec, operands, by_name["row_max"]))
    return tuple(wanted) if len(wanted) > 1 else wanted[0]


def max_or_nan(x: Array) -> Array:
    """The largest number of the last dimension, NaN if one is: max reductions of XLA's CPU backend drop NaN."""
    return jnp.where(jnp.isnan(x).any(-1), jnp.nan, x.max(-1, initial=-_INF))


def max_or_nan_over(axes: tuple[str, ...], x: Array) -> Array:
    """The largest number of all devices along the axes, NaN if one is."""
    is_nan = lax.pmax(jnp.isnan(x).astype(jnp.int32), axes) > 0
    return jnp.where(is_nan, jnp.nan, lax.pmax(x, axes))


def _largest(spec: AttentionSpec, operands: dict[str, Array], row_max: Array) -> Array:
    """`[b, hq]` from row maxima `[b, hq, sq]`, or packed `[n, hq]` from `[hq, tq]`; in a ring, over all devices."""
    row_max = lax.stop_gradient(row_max)
    if not spec.packed:
        largest = max_or_nan(row_max)
        if not spec.ring:
            return largest
        return max_or_nan_over(spec.ring.axes, largest)
    made = {"row_max": row_max, "offsets": operands["cu_seqlens_q"]}
    sharding = jax.typeof(row_max).sharding
    if not sharding.mesh.empty:
        sharding = sharding.update(spec=jax.sharding.PartitionSpec(None, sharding.spec[0]))
    manual = _jax.manual_axes()[0]
    found: Array = _by_sequence(made) if manual else _jax.in_automatic_axes(_by_sequence, made, sharding)
    return found


def of_cuda(lse: Array, row_max: Array) -> Array:
    """row_max as floats. CUDA kernels return an integer with the same order as the float, or 0 if the row sees no key.

    Their maxima ignore NaN, but a visible NaN makes lse NaN.
    """
    bits = lax.bitcast_convert_type(row_max, jnp.uint32)
    is_positive = bits >> 31 == 1
    found = lax.bitcast_convert_type(jnp.where(is_positive, bits ^ jnp.uint32(1 << 31), ~bits), jnp.float32)
    found = jnp.where(bits == 0, -_INF, found)
    return jnp.where(jnp.isnan(lse) & (found != _INF), jnp.nan, found)


@partial(jax.jit, inline=True)
def _by_sequence(operands: dict[str, Array]) -> Array:
    """The largest number of each sequence's rows, `[n, hq]`.

    A sequence consists of rows of its first and its last block and of all rows of the blocks between. A scatter would
    be slow on GPUs, because its updates of one element run one after the other.
    """
    row_max = operands["row_max"]
    heads, tokens = row_max.shape
    offsets = starts_of(operands["offsets"], tokens)
    lo, hi = offsets[:-1], offsets[1:]
    count = tokens // _BLOCK + 1
    padded = jnp.pad(row_max, ((0, 0), (0, count * _BLOCK - tokens)), constant_values=-_INF)
    blocks = padded.reshape(heads, count, _BLOCK)

    def of_block(block: Array) -> Array:
        """The largest number of the rows that a sequence has in one block, `[hq, n]`."""
        row = block[:, None] * _BLOCK + jnp.arange(_BLOCK, dtype=jnp.int32)[None]
        own = (lo[:, None] <= row) & (row < hi[:, None])
        return max_or_nan(jnp.where(own[None], blocks[:, block], -_INF))

    first, last = lo // _BLOCK, hi // _BLOCK
    block = jnp.arange(count, dtype=jnp.int32)[None]
    between = (first[:, None] < block) & (block < last[:, None])
    whole = max_or_nan(jnp.where(between[None], max_or_nan(blocks)[:, None], -_INF))
    return jnp.maximum(whole, jnp.maximum(of_block(first), of_block(last))).T
