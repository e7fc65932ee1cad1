"""A boolean array beside packed keys or pages: the call's block mask, whose blocks are single rows and keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import jax.numpy as jnp
from jax import Array, lax

from .. import reference
from .._jax import same_dim
from ..spec import AttentionSpec
from .forms import Blocks, Dense, Form, Pair, between, with_rank
from .rows import Rows
from .sizes import Sizes

WHOLE = 2**30  # the size of a block that has all rows or all keys of a sequence

F = TypeVar("F", bound=Form)


def block_of(conditions: Sequence[Form], sizes: Sizes) -> tuple[int, int]:
    """The numbers of rows and of keys in a block of the call's block mask; 0 if it has none."""
    array, blocks = _first(conditions, Dense), _first(conditions, Blocks)
    if array is None or sizes.keys is not None:
        return (0, 0) if blocks is None else blocks.block
    if blocks is not None:
        return 1, 1
    *_, rows, keys = with_rank(array.seen, 4).shape
    return (1 if _has_each(array, rows) else WHOLE, 1 if _has_each(array, keys) else WHOLE)


def block_mask(
    array: Dense, blocks: Blocks | None, shown: Array | None, spec: AttentionSpec, rows: Rows, sizes: Sizes
) -> Array:
    """The operand of blocks as large as `block_of` says. Rows of packed calls are packed tokens, unless a block has all
    rows of a sequence. `blocks`, `shown`: the blocks that hold as well, and which of them are visible."""
    # The barrier keeps XLA from evaluating what follows while it compiles, if the array is a constant of the program.
    seen: Array = lax.optimization_barrier(array.seen)
    sequence = rows.sequence
    if sizes.packed and (array.by_sequence or not same_dim(seen.shape[0], 1)):
        if _has_each(array, seen.shape[2]):
            seen = rows.of_sequences(seen)
        elif blocks is not None:  # by row, since rows differ in their blocks
            seen = _of_sequences(seen, rows)
    if blocks is None or shown is None:
        return seen
    columns = seen.shape[3] if _has_each(array, seen.shape[3]) else sizes.columns
    key = jnp.arange(columns, dtype=jnp.int32)
    beside = reference.seen_blocks(replace(spec, block=blocks.block), shown, rows.index[0], key, sequence)
    return seen & (beside if sequence is None else jnp.swapaxes(beside, 0, 1)[None])


def hull_of(shown: Array, block: tuple[int, int], rows: Rows) -> Pair:
    """From the first to the last key that each row sees in a mask whose blocks have one key; by these ranges kernels
    skip tiles."""
    keys = shown.shape[3]
    if same_dim(keys, 0):
        return between(0, 0)
    first = jnp.argmax(shown, 3)
    past = jnp.where(shown.any(3), keys - jnp.argmax(shown[..., ::-1], 3), 0)
    if rows.sequence is not None and block[0] == WHOLE:
        first, past = (_of_sequences(x, rows) for x in (first, past))
    return between(first, past)


def _of_sequences(x: Array, rows: Rows) -> Array:
    """The elements [1, h, s, …] of packed rows in an array [n|1, h|1, 1, …] with one for all rows of a sequence."""
    assert rows.sequence is not None
    return jnp.swapaxes(x[jnp.clip(rows.sequence, 0, x.shape[0] - 1), :, 0], 0, 1)[None]


def _has_each(array: Dense, size: int) -> bool:
    """Whether an array has each row or key for itself, instead of one element for all."""
    return bool(array.by_sequence) or not same_dim(size, 1)


def _first(conditions: Sequence[Form], kind: type[F]) -> F | None:
    return next((x for x in conditions if isinstance(x, kind)), None)
