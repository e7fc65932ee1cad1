"""The operands of one device in a call over a split sequence, and the parts that it computes: calls with a
`position`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..operands import BACKWARD, DROPOUT_BATCH, DROPOUT_ROW, FORWARD, OPTIONAL, Pass
from ..spec import UNLIMITED, AttentionSpec, Ring, narrower
from .schedule import Chunk, Range, Visit, Work, chunks, visits
from .transfer import send

COPIED = 16 << 20  # from this many elements on, copies are faster than one concatenation

Operands = dict[str, Array]
Block = dict[tuple[str, ...], Array]  # the keys at a distance, sent as one: names of operands → array
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
        return self._chunks("queries", self.operands["query"].shape[1])

    @cached_property
    def keys(self) -> tuple[Chunk, ...]:
        return self._chunks("keys", self.operands["key"].shape[1])

    def _chunks(self, of: str, size: int) -> tuple[Chunk, ...]:
        return (Chunk(0, size, 0, 0),) if self.ring.whole == of else chunks(self.spec, self.ring, size)

    @cached_property
    def visits(self) -> list[Visit]:
        """The visits in order. A backward keeps all but one of the calls on its own keys for the end."""
        spec, shifts = self._seen()
        found = visits(spec, self.ring, self.queries, self.keys, shifts, halves=self._splits)
        own = found[0]
        if self.pass_ is not BACKWARD or len(found) == 1 or len(own.work) == 1:
            return found
        return [replace(own, work=own.work[:1]), *found[1:], replace(own, work=own.work[1:])]

    @property
    def _splits(self) -> bool:
        """Whether several calls are to hide several transfers. They are if there is a band, because kernels then take
        tiles from a counter.

        Equal tiles have a fixed order: a CTA that NCCL's kernel delays keeps its tiles, so that every transfer delays a
        call.
        """
        return self.spec.limited and self.pass_ in (FORWARD, BACKWARD)

    def fetches_separately(self, visit: Visit) -> bool:
        """Whether K and V arrive during two calls of a visit, so that they need not be joined."""
        return self._splits and self.pass_ is FORWARD and len(visit.work) > 1

    @property
    def in_order(self) -> bool:
        """Whether keys that arrive wait for the first call, which takes longer than they do. Otherwise XLA may first
        use the keys of a neighbour to which results have to be sent back."""
        return len(self.visits[0].work) > 1 or self.visits[-1].distance == 0

    @property
    def block(self) -> Block:
        """This device's own keys, with all operands that have an element per key."""
        sent = [name for name in self.operands if "sk" in self.spec.dims[name] and name not in self._again]
        return {(name,): self.operands[name] for name in sent}

    @property
    def _again(self) -> dict[str, str]:
        """Operands that are the same arrays as others: V, and its tangent, if V is K."""
        pairs = {"value": "key", "tvalue": "tkey"} if self.spec.shared_kv else {}
        return {name: other for name, other in pairs.items() if name in self.operands}

    # --- transfers -----------------------------------------------------------------------------------------------

    def halves(self, block: Block) -> tuple[Block, Block]:
        """This device's keys, and its values."""
        values: Block = {names: x for names, x in block.items() if names == ("value",)}
        return {names: x for names, x in block.items() if names not in values}, values

    def fetch(self, block: Block, visit: Visit) -> Block:
        """Exchanges keys: sends this device's own to those that need them, and receives those of the visit from their
        owners; zeros if it sees none of them."""
        if visit.distance == 0:
            return block
        return self.send(
            {
                name: lax.slice_in_dim(x, visit.start, visit.start + visit.size, axis=1)
                for (name,), x in block.items()
            },
            visit.route,
        )

    def send(self, arrays: Operands, route: Sequence[tuple[int, int]]) -> Block:
        """Sends arrays of one dtype and rank as one, as XLA runs one transfer at a time, and a call hides only one.

        Arrays of one shape are joined along a new dimension, others along the head dim, so that heads may lie on
        automatic mesh axes.
        """
        arrived: Block = {}
        for kind in dict.fromkeys((x.dtype, x.ndim) for x in arrays.values()):
            names = tuple(name for name, x in arrays.items() if (x.dtype, x.ndim) == kind)
            several = [arrays[name] for name in names]
            equal = len({x.shape for x in several}) == 1
            joined = _stacked(several) if equal else jnp.concatenate(several, -1)
            arrived[names] = send(joined, self.ring, route)
        return arrived

    def take(self, block: Block, part: Range | None = None, begin: int = 0) -> Operands:
        """The arrays of a block, or of a part of its keys; the block has the keys from `begin` on.

        A call reads them in place in the received array, if only slices and a final reshape come between.
        """
        found: Operands = {}
        for names, joined in block.items():
            dims = len(self.spec.dims[names[0]])
            stacked = joined.ndim > dims
            if part is not None:
                joined = self._slice(joined, joined.ndim - dims + 1, part, begin)
            if stacked:
                for i, name in enumerate(names):
                    found[name] = lax.reshape(lax.slice_in_dim(joined, i, i + 1), joined.shape[1:])
            else:
                ends = list(accumulate(self.operands[name].shape[-1] for name in names))
                found |= zip(names, jnp.split(joined, ends[:-1], -1) if len(names) > 1 else [joined])
        return found | {name: found[other] for name, other in self._again.items() if other in found}

    # --- one part ------------------------------------------------------------------------------------------------

    def compute(self, call: Call, visit: Visit, work: Work, block: Block) -> list[Array]:
        """The pass's results on a part of the queries and of the keys that the visit brought."""
        queries, keys = work.queries, work.keys
        row, column = self.row(work), self.column(visit, work)
        made = self.take(block, keys, visit.start)
        for name, x in self.operands.items():
            if name == "dropout":
                made[name] = x.at[DROPOUT_ROW:].add(jnp.stack([row, column]).astype(jnp.uint32))
            elif name == "q_lengths":
                made[name] = _within(x, row, queries.size)
            elif name == "kv_lengths":
                made[name] = _within(x, column, keys.size)
            elif name == "sinks" and not (self.pass_ is FORWARD and work.first):
                continue  # each row must count its sink only once
            elif name not in made:
                axis = self._rows(name)
                made[name] = x if axis is None else self._slice(x, axis, queries)
                if name == "ranges":
                    made[name] = jnp.maximum(made[name], 0) - column
                if self.has_columns(name):
                    made[name] = lax.dynamic_slice_in_dim(made[name], column, keys.size, -1)
        if "sinks" in made and self.ring.whole == "queries":
            made["sinks"] = jnp.where(self.device == 0, made["sinks"], -jnp.inf)
        spec = replace(self.spec, ring=None, align="top_left")
        if work.whole:
            spec = replace(spec, left=UNLIMITED, right=UNLIMITED)
        diagonal = spec.limited or spec.window_is_data or "alibi_slopes" in made
        if diagonal or "block_mask" in made:  # only the diagonal has a shift, not the block mask
            shift = self._shift() if diagonal else 0
            made["position"] = jnp.stack(jnp.broadcast_arrays(row + shift, column), -1)
        spec = replace(spec, operands=tuple(name for name in OPTIONAL if name in made))
        each = "position" in made and made["position"].ndim == 2
        results = self._by_batch_entry(call, spec, made) if each else list(call(self.pass_, spec, made))
        # XLA on GPUs would fuse a call with an update of a part of a buffer by its result. That may make a cycle if the
        # update depends on another result of the call (Total.result). XLA does not fuse across a barrier.
        apart: list[Array] = lax.optimization_barrier(results)
        return apart

    def row(self, work: Work) -> Array:
        """The position of a call's first query in the sequence."""
        return self._position(work.queries, 0)

    def column(self, visit: Visit, work: Work) -> Array:
        """The position of a call's first key in the sequence."""
        return self._position(work.keys, visit.distance)

    def _position(self, part: Range, distance: int) -> Array:
        """The position of a part's first token among the tokens of the device at this distance."""
        n = self.ring.size
        if len(set(part.chunks)) == 1:
            owner = lax.rem(self.device + (n - distance), jnp.int32(n)) if distance else self.device
            position: Array = part.chunks[0].position(owner) + part.start
            return position
        starts = [chunk.position((i - distance) % n) + part.start for i, chunk in enumerate(part.chunks)]
        return self.entry(starts)

    def has_columns(self, name: str) -> bool:
        """Whether a mask or bias has a column for each key of the whole sequence, so that parts slice its columns."""
        return name in ("mask", "bias", "tbias") and self.operands[name].shape[-1] != 1

    def place(self, total: Array | None, dbias: Array, visit: Visit, work: Work) -> Array:
        """The gradient of a bias, to which that of a part has been added."""
        bias = self.operands["bias"]
        if total is None:
            total = jnp.zeros(bias.shape, dbias.dtype)
        starts = work.queries.starts()
        row = self.entry(starts if bias.shape[2] != 1 else [0] * self.ring.size)
        none = jnp.int32(0)  # of the type of the other indices, because JAX requires one type
        start = (none, none, row, self.column(visit, work))
        added = lax.dynamic_slice(total, start, dbias.shape) + dbias
        return lax.dynamic_update_slice(total, added, start)

    def entry(self, table: Sequence[int]) -> Array:
        """This device's entry of a table."""
        mine: Array = lax.dynamic_index_in_dim(jnp.asarray(table, jnp.int32), self.device, keepdims=False)
        return mine

    def _slice(self, x: Array, axis: int, part: Range, begin: int = 0) -> Array:
        """A part of an array along the tokens of a shard; the array has those from `begin` on."""
        starts = part.starts(begin)
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
        """Like `call`, for batch entries at different positions: each becomes one entry of a leading dimension."""
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
        """Whether an operand differs between batch entries."""
        b, *_ = self.spec.dims[name]
        return b == "b" or (b == "b*" and self.operands[name].shape[0] != 1)

    # --- the sequence --------------------------------------------------------------------------------------------

    @cached_property
    def _sizes(self) -> tuple[int, int]:
        """Queries and keys of the whole sequence."""
        q, k = (self.operands[name].shape[1] for name in ("query", "key"))
        return q * self.ring.shards("queries"), k * self.ring.shards("keys")

    def _seen(self) -> tuple[AttentionSpec, tuple[int, int]]:
        """A spec whose band is also that of its reach, and its `_shifts`."""
        spec, shifts, (left, right, _) = self.spec, self._shifts(), self.spec.reach
        if "window_offset" in spec.operands:  # its value is not known, so the band's place is not
            return replace(spec, left=left, right=right), (0, 0)
        if (left, right) == (UNLIMITED, UNLIMITED) or (spec.limited and shifts != (0, 0)):
            return spec, shifts
        return replace(spec, left=narrower(spec.left, left), right=narrower(spec.right, right)), (0, 0)

    def _shifts(self) -> tuple[int, int]:
        """The least and the largest key that lengths may put on the diagonal of query 0."""
        if self.spec.align == "top_left":
            return 0, 0
        sq, sk = self._sizes
        least = (0 if "kv_lengths" in self.operands else sk) - sq
        return least, sk - (0 if "q_lengths" in self.operands else sq)

    def _shift(self) -> Any:
        """The key on the diagonal of query 0; `[b]` if it depends on lengths."""
        if self.spec.align == "top_left":
            return 0
        nq, nk = (
            jnp.clip(self.operands[name], 0, size) if name in self.operands else size
            for name, size in zip(("q_lengths", "kv_lengths"), self._sizes)
        )
        return nk - nq


def _within(lengths: Array, start: Array, size: int) -> Array:
    """The number of a part's rows in use. A negative length becomes 0 before the subtraction, which could wrap
    around."""
    return jnp.clip(jnp.maximum(lengths, 0) - start, 0, size)


def _stacked(arrays: Sequence[Array]) -> Array:
    """Arrays of one shape along a new leading dimension. XLA on GPUs concatenates at a third of the rate of a copy, but
    begins each copy later."""
    if len(arrays) == 1 or arrays[0].size < COPIED:
        return jnp.stack(arrays)
    stacked: Array = lax.empty((len(arrays), *arrays[0].shape), arrays[0].dtype)
    for i, x in enumerate(arrays):
        stacked = lax.dynamic_update_index_in_dim(stacked, x, i, 0)
    return stacked
