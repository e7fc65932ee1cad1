"""The offsets of packed sequences, `cu_seqlens`, whatever they hold: their running maximum within the tokens."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .search import first_from


def starts_of(cu_seqlens: jax.Array, tokens: Any) -> jax.Array:
    """The offsets that a call uses, never decreasing and within [0, tokens]."""
    return lax.cummax(jnp.clip(cu_seqlens, 0, tokens))


def locate(cu_seqlens: jax.Array, tokens: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For each packed token: its sequence, its position in it (−1 outside every sequence), and the sequence's rows."""
    cu = starts_of(cu_seqlens, tokens)
    token = jnp.arange(tokens, dtype=jnp.int32)
    owner = owners(cu, token)
    inside = (owner >= 0) & (owner < cu.shape[0] - 1)
    sequence = jnp.where(inside, owner, 0)
    length = jnp.diff(cu, append=cu[-1:])[sequence]
    return sequence, jnp.where(inside, token - cu[sequence], -1), length


def owners(starts: jax.Array, token: jax.Array) -> jax.Array:
    """The index of the last of the ascending starts that is at or before each token, −1 where there is none."""
    first, count = jnp.int32(0), jnp.asarray(starts.shape[0], jnp.int32)
    return first_from(starts, first, count, token, starts.shape[0], above=True) - 1
