"""Sequence parallelism by all-to-all: tokens are exchanged for heads, and back.

Each device begins with all heads of its own tokens. An all-to-all gives it all tokens of its own heads, on which the
ordinary call runs, and a second all-to-all returns the results to the devices of their tokens. Options and derivatives
are those of the ordinary call; JAX differentiates the collectives.

Source: Jacobs et al., DeepSpeed Ulysses (2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax

from . import _jax
from .autodiff import Operands, Results, attend, is_empty, without_elements
from .operands import DROPOUT_HEAD
from .sequence.transfer import gathered, send
from .spec import AttentionSpec, Ring
from .zigzag import zigzag_permute, zigzag_unpermute


def all_to_all_attention(spec: AttentionSpec, operands: Operands) -> Results:
    """The results of `attend` for this device's tokens, from the checked operands of a ring_attention call.

    query, key, value, segment ids and sinks by token have this device's tokens. mask and bias have the rows of these
    tokens and the columns of all keys, in the order of the sequence. lengths count the whole sequence. slopes, sinks by
    head and dropout have all heads.
    """
    assert spec.ring is not None
    if is_empty(operands):
        return without_elements(spec, operands)
    hq, hk = operands["query"].shape[2], operands["key"].shape[2]
    exchange = _Exchange(spec.ring, "dropout" in operands, hq, hk)
    rows = operands["query"].shape[1]
    shared = {"value"} if spec.shared_kv else set()
    whole = {name: exchange.by_heads(name, x, rows) for name, x in operands.items() if name not in shared}
    whole |= dict.fromkeys(shared, whole["key"])
    out, *by_row = attend(replace(spec, ring=None), whole)
    return exchange.to_tokens(out, 1, 2), *(exchange.to_tokens(x, 2, 1) for x in by_row)


@dataclass(frozen=True)
class _Exchange:
    """Converts arrays between two distributions over devices: by tokens and by heads.

    A KV head that several devices read is repeated (`times`); each copy then serves `step` query heads. Device i of n
    takes the copies i, i + n, … with their query heads, so that heads that are sharded over an automatic mesh axis stay
    where they are. With dropout, which numbers query heads, each device takes consecutive ones (`whole_runs`).
    """

    ring: Ring
    whole_runs: bool
    hq: int
    hk: int

    @property
    def devices(self) -> int:
        return self.ring.size

    @property
    def zigzag(self) -> bool:
        return self.ring.order == "zigzag"

    @property
    def device(self) -> jax.Array:
        own: jax.Array = lax.axis_index(self.ring.axes)
        return own

    @property
    def step(self) -> int:
        return math.gcd(self.hq // self.devices, self.hq // self.hk)

    @property
    def times(self) -> int:
        return self.hq // self.hk // self.step

    def by_heads(self, name: str, x: jax.Array, rows: int) -> jax.Array:
        """The operand for the ordinary call on this device's heads; `rows`: queries per device."""
        changes: dict[str, Callable[[], jax.Array]] = {
            "query": lambda: self.to_heads(x, 1, 2),
            "key": lambda: self.to_heads(self.repeated(x), 1, 2),
            "value": lambda: self.to_heads(self.repeated(x), 1, 2),
            "q_segment_ids": lambda: self.all_tokens(x, 1),
            "kv_segment_ids": lambda: self.all_tokens(x, 1),
            "mask": lambda: self.scores(x, rows),
            "bias": lambda: self.scores(x, rows),
            "ranges": lambda: self.scores(x, rows),
            "block_mask": lambda: self.own_heads(x, 1) if x.shape[1] == self.hq else x,
            "alibi_slopes": lambda: self.own_heads(x, 1),
            "sinks": lambda: self.to_heads(x, 1, 2) if x.shape[1] == rows else self.own_heads(x, 2),
            "dropout": lambda: x.at[DROPOUT_HEAD].add(self.first_head()),
        }
        return changes[name]() if name in changes else x

    def repeated(self, x: jax.Array) -> jax.Array:
        """Keys or values [b, s, hk, d], each head `times` times."""
        if self.times == 1:
            return x

        def repeat(x: jax.Array) -> jax.Array:
            return jnp.repeat(x, self.times, 2, out_sharding=_jax.explicit_sharding(x))

        return _jax.repeated(repeat, x)

    def scores(self, x: jax.Array, rows: int) -> jax.Array:
        """A mask or bias [b|1, hq|1, rows|1, sk|1] with the columns of all keys in the order of the sequence, or ranges
        of such keys."""
        by_head, by_row = x.shape[1] == self.hq, x.shape[2] == rows
        if by_head and by_row:
            return self.to_heads(x, 2, 1)
        if by_head:
            return self.own_heads(x, 1)
        return self.all_tokens(x, 2) if by_row else x

    # --- `tokens` and `heads` are the axes of these dimensions -----------------------------------------------------

    def to_heads(self, x: jax.Array, tokens: int, heads: int) -> jax.Array:
        """[…, tokens per device, …, heads, …] → [… all tokens …, heads per device, …]."""
        cut, device = self.cut(x, heads)
        after = tokens if tokens < heads else tokens + 2  # the cut replaces the dimension `heads` by three
        x = self.exchanged(cut, device, after)
        return self.in_sequence(_joined(x, heads), tokens)

    def to_tokens(self, x: jax.Array, tokens: int, heads: int) -> jax.Array:
        """The inverse of `to_heads`."""
        x = zigzag_permute(x, self.devices, tokens) if self.zigzag else x
        cut, device = self.cut(x, heads, devices=1)
        before = tokens if tokens < heads else tokens + 2
        return _joined(self.exchanged(cut, before, device), heads)

    def exchanged(self, x: jax.Array, split: int, concat: int) -> jax.Array:
        """lax.all_to_all, or n − 1 permutes if some mesh axes are automatic, because XLA would gather around it."""
        if _jax.manual_axes()[1]:
            at_once: jax.Array = lax.all_to_all(x, self.ring.axes, split, concat, tiled=True)
            return at_once
        x = _jax.whole_along(x, split)
        n, own, size = self.devices, self.device, x.shape[split] // self.devices
        received: jax.Array | None = None
        for ahead in range(n):
            piece = lax.dynamic_slice_in_dim(x, (own + ahead) % n * size, size, split)
            pairs = [(device, (device + ahead) % n) for device in range(n)]
            piece = send(piece, self.ring, pairs) if ahead else piece
            if received is None:
                shape = tuple(
                    n * extent if axis == concat else extent for axis, extent in enumerate(piece.shape)
                )
                received = lax.empty(shape, piece.dtype, out_sharding=_jax.explicit_sharding(piece))
            place = (own - ahead) % n * piece.shape[concat]
            received = lax.dynamic_update_slice_in_dim(received, piece, place, concat)
        assert received is not None
        return received

    def cut(self, x: jax.Array, heads: int, devices: int | None = None) -> tuple[jax.Array, int]:
        """x with the dimension `heads` split into three, one of which counts devices, and the axis of that one."""
        devices = self.devices if devices is None else devices
        count = x.shape[heads]
        step = self.step if count * self.devices // devices == self.hq else 1
        parts = (devices, count // devices // step, step)
        if not self.whole_runs:
            parts = (parts[1], devices, step)
        return _jax.with_dim_split(x, heads, parts), heads if self.whole_runs else heads + 1

    def own_heads(self, x: jax.Array, heads: int) -> jax.Array:
        cut, device = self.cut(x, heads)
        own = lax.dynamic_slice_in_dim(_jax.whole_along(cut, device), self.device, 1, device)
        return _joined(own, heads)

    def first_head(self) -> jax.Array:
        return (self.device * (self.hq // self.devices)).astype(jnp.uint32)

    def all_tokens(self, x: jax.Array, tokens: int) -> jax.Array:
        # JAX does not lower the transpose, a reduce-scatter, beside explicit axes (0.12).
        every: jax.Array = _jax.in_automatic_axes(
            lambda x: gathered(x, self.ring.axes, tokens), x, jax.typeof(x).sharding
        )
        return self.in_sequence(every, tokens)

    def in_sequence(self, x: jax.Array, tokens: int) -> jax.Array:
        return zigzag_unpermute(x, self.devices, tokens) if self.zigzag else x


def _joined(x: jax.Array, heads: int) -> jax.Array:
    """x with the dimensions heads, heads + 1 and heads + 2 merged."""
    return x.reshape(*x.shape[:heads], math.prod(x.shape[heads : heads + 3]), *x.shape[heads + 3 :])
