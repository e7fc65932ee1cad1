"""What one device holds of a call over a split sequence, and the parts that it computes: calls with a `position`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..operands import DROPOUT_BATCH, DROPOUT_ROW, FORWARD, OPTIONAL, Pass
from ..spec import UNLIMITED, AttentionSpec, Ring
from .schedule import Chunk, Range, Visit, Work, chunks, visits

Operands = dict[str, Array]
Call = Callable[[Pass, AttentionSpec, Operands], Sequence[Array]]


@dataclass(frozen=True)
class Shard:
    """The local operands of one pass, without leading dimensions."""

    pass_: Pass
    spec: AttentionSpec
    operands: Operands

    @property
    def ring(self) -> Ring:
        assert self.spec.ring is not None
        return self.spec.ring

    @cached_property
    def device(self) -> Array:
        return lax.axis_index(self.ring.axes)

    @cached_property
    def queries(self) -> tuple[Chunk, ...]:
        return chunks(self.spec, self.ring, self.operands["query"].shape[1])

    @cached_property
    def keys(self) -> tuple[Chunk, ...]:
        return chunks(self.spec, self.ring, self.operands["key"].shape[1])

    @cached_property
    def visits(self) -> list[Visit]:
        return visits(self.spec, self.ring, self.queries, self.keys, self._shifts())

    @property
    def block(self) -> Operands:
        """This device's own keys, with all that there is one of for each key."""
        return {name: x for name, x in self.operands.items() if "sk" in self.spec.dims[name]}

    # --- transfers -----------------------------------------------------------------------------------------------

    def fetch(self, block: Operands, visit: Visit) -> Operands:
        """The keys of a visit, from the devices that own them; zeros where this device sees none."""
        return self.send(
            {n: lax.slice_in_dim(x, visit.start, visit.start + visit.size, axis=1) for n, x in block.items()},
            visit.route,
        )

    def send(self, arrays: Operands, route: Sequence[tuple[int, int]]) -> Operands:
        """Arrays of one dtype travel as one: XLA has one transfer under way at a time, and a call hides only one.

        They are joined along the head dim, or along a new one, so that heads may lie on automatic mesh axes.
        """
        arrived: Operands = {}
        for dtype in dict.fromkeys(x.dtype for x in arrays.values()):
            names = [name for name, x in arrays.items() if x.dtype == dtype]
            joined = [arrays[name] for name in names]
            equal = len({x.shape for x in joined}) == 1
            packed = lax.ppermute(
                jnp.stack(joined) if equal else jnp.concatenate(joined, -1), self.ring.axes, route
            )
            ends = list(accumulate(x.shape[-1] for x in joined))
            arrived |= zip(names, packed if equal else jnp.split(packed, ends[:-1], -1))
        return arrived

    # --- one part ------------------------------------------------------------------------------------------------

    def compute(self, call: Call, visit: Visit, work: Work, block: Operands) -> list[Array]:
        """The pass's results on a part of the queries and of the keys that the visit brought."""
        queries, keys = work.queries, work.keys
        row, column = self.row(work), self.column(visit, work)
        made = {
            name: self._slice(x, 1, keys, self.keys, visit.start) if name in self.block else x
            for name, x in block.items()
        }
        for name, x in self.operands.items():
            if name == "dropout":
                made[name] = x.at[DROPOUT_ROW:].add(jnp.stack([row, column]).astype(jnp.uint32))
            elif name == "q_lengths":
                made[name] = jnp.clip(x - row, 0, queries.size)
            elif name == "kv_lengths":
                made[name] = jnp.clip(x - column, 0, keys.size)
            elif name == "sinks":
                if self.pass_ is FORWARD and visit.distance == 0 and queries.chunk == keys.chunk:
                    made[name] = x  # each row sums over its sink once
            elif name not in block:
                axis = self._rows(name)
                made[name] = x if axis is None else self._slice(x, axis, queries, self.queries)
                if self.has_columns(name):
                    made[name] = lax.dynamic_slice_in_dim(made[name], column, keys.size, -1)
        spec = replace(self.spec, ring=None, align="top_left")
        if work.whole:
            spec = replace(spec, left=UNLIMITED, right=UNLIMITED)
        if spec.limited or "alibi_slopes" in made:
            made["position"] = jnp.stack(jnp.broadcast_arrays(row + self._shift(), column), -1)
        spec = replace(spec, operands=tuple(name for name in OPTIONAL if name in made))
        each = "position" in made and made["position"].ndim == 2
        results = self._by_batch_entry(call, spec, made) if each else list(call(self.pass_, spec, made))
        # XLA on GPUs would fuse a call with an update of a part of a buffer by its result, which may make a cycle where
        # the update depends on another result of the call (Total.result): it does not look beyond a barrier.
        apart: list[Array] = lax.optimization_barrier(results)
        return apart

    def row(self, work: Work) -> Array:
        """The position of a call's first query in the sequence."""
        own = zip(work.queries.chunk, range(self.ring.size))
        return self.entry([self.queries[c].position(i) + work.queries.start for c, i in own])

    def column(self, visit: Visit, work: Work) -> Array:
        """The position of a call's first key in the sequence."""
        owners = ((i - visit.distance) % self.ring.size for i in range(self.ring.size))
        return self.entry(
            [self.keys[c].position(i) + work.keys.start for c, i in zip(work.keys.chunk, owners)]
        )

    def has_columns(self, name: str) -> bool:
        """Whether a mask or bias has a column for each key of the whole sequence, so that parts take some of them."""
        return name in ("mask", "bias", "tbias") and self.operands[name].shape[-1] != 1

    def place(self, total: Array | None, dbias: Array, visit: Visit, work: Work) -> Array:
        """The gradient of a bias, with that of a part added."""
        bias = self.operands["bias"]
        if total is None:
            total = jnp.zeros(bias.shape, dbias.dtype)
        starts = [self.queries[c].offset + work.queries.start for c in work.queries.chunk]
        row = self.entry(starts if bias.shape[2] != 1 else [0] * self.ring.size)
        start = (0, 0, row, self.column(visit, work))
        added = lax.dynamic_slice(total, start, dbias.shape) + dbias
        return lax.dynamic_update_slice(total, added, start)

    def entry(self, table: Sequence[int]) -> Array:
        """This device's entry."""
        mine: Array = lax.dynamic_index_in_dim(jnp.asarray(table, jnp.int32), self.device, keepdims=False)
        return mine

    def _slice(self, x: Array, axis: int, part: Range, whole: Sequence[Chunk], begin: int = 0) -> Array:
        """A part of an array along the tokens of a shard, of which it has those from `begin` on."""
        starts = [whole[c].offset + part.start - begin for c in part.chunk]
        if len(set(starts)) == 1:
            return lax.slice_in_dim(x, starts[0], starts[0] + part.size, axis=axis)
        return lax.dynamic_slice_in_dim(x, self.entry(starts), part.size, axis)

    def _rows(self, name: str) -> int | None:
        """The axis of an operand along this device's queries; None where all of them share it."""
        dims = [dim.rstrip("*") for dim in self.spec.dims[name]]
        if "sq" not in dims:
            return None
        axis = dims.index("sq")
        return axis if self.operands[name].shape[axis] == self.operands["query"].shape[1] else None

    def _by_batch_entry(self, call: Call, spec: AttentionSpec, made: Operands) -> list[Array]:
        """As `call`, where batch entries lie differently: each is one entry of a leading dimension."""
        if "dropout" in made:
            entries = jnp.arange(made["query"].shape[0], dtype=jnp.uint32)
            made["dropout"] = jax.vmap(made["dropout"].at[DROPOUT_BATCH].add)(entries)
        apart = ("dropout", "position")  # these have no batch dimension of their own
        axes = {name: 0 if name in apart or self._by_entry(name) else None for name in made}

        def one(entry: Operands) -> list[Array]:
            whole = {n: x[None] if axes[n] == 0 and n not in apart else x for n, x in entry.items()}
            return list(call(self.pass_, spec, whole))

        results = jax.vmap(one, in_axes=(axes,))(made)
        shared = self.pass_.results == ("dbias",) and not self._by_entry("bias")
        return [x.sum(0) if shared else x[:, 0] for x in results]

    def _by_entry(self, name: str) -> bool:
        """Whether an operand has something of its own for each batch entry."""
        b, *_ = self.spec.dims[name]
        return b == "b" or (b == "b*" and self.operands[name].shape[0] != 1)

    # --- the sequence --------------------------------------------------------------------------------------------

    @cached_property
    def _sizes(self) -> tuple[int, int]:
        """Queries and keys of the whole sequence."""
        q, k = (self.operands[name].shape[1] for name in ("query", "key"))
        return q * self.ring.size, k * self.ring.size

    def _shifts(self) -> tuple[int, int]:
        """The least and the largest key on the diagonal of query 0 that lengths may lead to."""
        if self.spec.align == "top_left":
            return 0, 0
        sq, sk = self._sizes
        least = (0 if "kv_lengths" in self.operands else sk) - sq
        return least, sk - (0 if "q_lengths" in self.operands else sq)

    def _shift(self) -> Any:
        """The key on the diagonal of query 0; `[b]` where it depends on lengths."""
        if self.spec.align == "top_left":
            return 0
        nq, nk = (
            jnp.clip(self.operands[name], 0, size) if name in self.operands else size
            for name, size in zip(("q_lengths", "kv_lengths"), self._sizes)
        )
        return nk - nq
