"""Dropout bits: Philox4x32-7 in uint32 jax.numpy, with the same bits as `csrc/core` on every platform.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.random import threefry_2x32

ROUNDS = 7  # the fewest with which all tests of the paper pass
# A tile of this size needs 32 Philox blocks of four 32-bit words. Each block serves the elements that one thread holds
# in tensor core accumulators (mma.m16n8): columns 2t and 2t + 1 of every 8, rows i and i + 8.
ROWS, COLUMNS = 16, 32
NUMBERS = 1 << 15  # a dropout number is the lower 15 bits of half a word
_MULTIPLIERS = (np.uint32(0xD2511F53), np.uint32(0xCD9E8D57))
_WEYL = (np.uint32(0x9E3779B9), np.uint32(0xBB67AE85))
_LOW = np.uint32(0xFFFF)
_HALF = np.uint32(16)

Words = tuple[Array, Array, Array, Array]


def _multiply(a: np.uint32, b: Array) -> tuple[Array, Array]:
    """The high and low words of a·b, by 16-bit limbs so that no 64-bit type is needed."""
    a_high, a_low, b_high, b_low = a >> _HALF, a & _LOW, b >> _HALF, b & _LOW
    middle = a_low * b_high + (a_low * b_low >> _HALF)
    carry = a_high * b_low + (middle & _LOW)
    return a_high * b_high + (middle >> _HALF) + (carry >> _HALF), a * b


def philox4x32(key: tuple[Array, Array], counter: Words) -> Words:
    """The four uint32 words of Philox4x32-7; `key` and `counter` broadcast against each other."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _WEYL[0], k1 + _WEYL[1]
    return c0, c1, c2, c3


def key_words(words: Array) -> Array:
    """The two words of Philox's key, uint32 `[2]`, from the words of a JAX key of any implementation.

    A key of two words, such as threefry's, is returned as it is. In a longer key, each pair of words is encrypted
    (Threefry-2x32) with the result so far as the key, so that every word counts. Adding or XORing the pairs would not
    do, because the two halves of an rbg key are equal after a seed, a split and a fold.
    """
    padded = jnp.pad(words.ravel(), (0, words.size % 2))
    first, *others = padded.reshape(-1, 2)
    folded: Array = reduce(lambda key, pair: threefry_2x32((key[0], key[1]), pair), others, first)
    return folded


def threshold(rate: float) -> int:
    """Elements with a 15-bit number below this are dropped: `rate · 32768`, from `rate` in float32 as kernels have
    it."""
    return round(float(np.float32(rate)) * NUMBERS)


def keep(dropout: Array, rate: float, batch: Array, head: Array, row: Array, column: Array) -> Array:
    """The elements of P that are kept, boolean, in the broadcast shape of the four int32 positions.

    Args:
      dropout: uint32 `[6]`: two key words, then the global offsets of this shard's batch, head, row and column.
      rate: the probability that an element is dropped.
      batch, head, row, column: positions within this shard; row and column are positions within the sequence.
    """
    key0, key1, batch0, head0, row0, column0 = (dropout[i] for i in range(6))
    batch, head, row, column = (
        position.astype(jnp.uint32) + offset
        for position, offset in ((batch, batch0), (head, head0), (row, row0), (column, column0))
    )
    two, eight, rows, columns = map(np.uint32, (2, 8, ROWS, COLUMNS))
    block = column // columns * np.uint32(4) + column // two % np.uint32(4)
    words = philox4x32((key0, key1), (block, row // rows * eight + row % eight, head, batch))
    word = jax.lax.select_n(
        jnp.broadcast_to((column % columns // eight).astype(jnp.int32), words[0].shape),
        *(jnp.broadcast_to(word, words[0].shape) for word in words),
    )
    rotated = word >> eight | word << np.uint32(24)
    bits = jnp.where(row % rows < eight, word, rotated) >> (column % two * _HALF) & np.uint32(NUMBERS - 1)
    return bits >= np.uint32(threshold(rate))
