"""What one device holds of a call over a split sequence, and the parts that it computes: calls with a `position`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..operands import DROPOUT_BATCH, DROPOUT_ROW, FORWARD, OPTIONAL, Pass
from ..spec import AttentionSpec, Ring
from .schedule import Chunk, Visit, chunks, visits

Operands = dict[str, Array]
Call = Callable[[Pass, AttentionSpec, Operands], Sequence[Array]]
Blocks = list[Operands]  # what travels of a shard of keys, by chunk


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
    def blocks(self) -> Blocks:
        """This device's own keys, with all that there is one of for each key."""
        return [{name: self._along(name, "sk", chunk) for name in self._travelling} for chunk in self.keys]

    def fetch(self, blocks: Blocks, visit: Visit) -> Blocks:
        """The keys of a visit, from the devices that own them; zeros where the device sees none of a chunk."""
        return [
            {name: self.send(x, route) for name, x in block.items()}
            for block, route in zip(blocks, visit.routes)
        ]

    def send(self, x: Array, route: Sequence[tuple[int, int]]) -> Array:
        return lax.ppermute(x, self.ring.axes, route) if route else jnp.zeros_like(x)

    # --- one part ------------------------------------------------------------------------------------------------

    def compute(self, call: Call, visit: Visit, pair: tuple[int, int], block: Operands) -> list[Array]:
        """The pass's results on a chunk of queries and a chunk of the keys that the visit brought."""
        query, key = self.queries[pair[0]], self.keys[pair[1]]
        row = jnp.asarray(query.position(self.device), jnp.int32)
        column = self._column(visit, pair[1])
        made = dict(block)
        for name, x in self.operands.items():
            if name == "dropout":
                made[name] = x.at[DROPOUT_ROW:].add(jnp.stack([row, column]).astype(jnp.uint32))
            elif name == "q_lengths":
                made[name] = jnp.clip(x - row, 0, query.size)
            elif name == "kv_lengths":
                made[name] = jnp.clip(x - column, 0, key.size)
            elif name == "sinks":
                if self.pass_ is FORWARD and visit.distance == 0 and pair[0] == pair[1]:
                    made[name] = x  # each row sums over its sink once
            elif name not in block:
                made[name] = self._along(name, "sq", query)
                if self.has_columns(name):
                    made[name] = lax.dynamic_slice_in_dim(made[name], column, key.size, -1)
        spec = replace(self.spec, ring=None, align="top_left")
        if self.spec.limited or "alibi_slopes" in made:
            diagonal = row + self._shift()
            made["position"] = jnp.stack(jnp.broadcast_arrays(diagonal, column), -1)
        spec = replace(spec, operands=tuple(name for name in OPTIONAL if name in made))
        if "position" in made and made["position"].ndim == 2:
            return self._by_batch_entry(call, spec, made)
        return list(call(self.pass_, spec, made))

    def place(self, total: Array | None, dbias: Array, visit: Visit, pair: tuple[int, int]) -> Array:
        """The gradient of a bias, with that of a part added."""
        bias = self.operands["bias"]
        if total is None:
            total = jnp.zeros(bias.shape, dbias.dtype)
        row = self.queries[pair[0]].offset if bias.shape[2] != 1 else 0
        start = (0, 0, row, self._column(visit, pair[1]))
        added = lax.dynamic_slice(total, start, dbias.shape) + dbias
        return lax.dynamic_update_slice(total, added, start)

    def _column(self, visit: Visit, k: int) -> Array:
        """Where a chunk of a visit's keys begins in the sequence."""
        owner = (self.device - visit.distance) % self.ring.size
        return jnp.asarray(self.keys[k].position(owner), jnp.int32)

    def has_columns(self, name: str) -> bool:
        """Whether a mask or bias has a column for each key of the whole sequence, so that parts take some of them."""
        return name in ("mask", "bias", "tbias") and self.operands[name].shape[-1] != 1

    def _by_batch_entry(self, call: Call, spec: AttentionSpec, made: Operands) -> list[Array]:
        """As `call`, where batch entries lie differently: each is one entry of a leading dimension."""
        size = made["query"].shape[0]
        if "dropout" in made:
            entries = jnp.arange(size, dtype=jnp.uint32)
            made["dropout"] = jax.vmap(made["dropout"].at[DROPOUT_BATCH].add)(entries)
        axes = {name: 0 if name in ("dropout", "position") or self._by_entry(name) else None for name in made}

        def one(entry: Operands) -> list[Array]:
            whole = {
                name: x[None] if axes[name] == 0 and name not in ("dropout", "position") else x
                for name, x in entry.items()
            }
            return list(call(self.pass_, spec, whole))

        results = jax.vmap(one, in_axes=(axes,))(made)
        shared = not self._by_entry("bias") if self.pass_.results == ("dbias",) else False
        return [x.sum(0) if shared else x[:, 0] for x in results]

    def _by_entry(self, name: str) -> bool:
        """Whether an operand has something of its own for each batch entry."""
        b, *_ = self.spec.dims[name]
        return b == "b" or (b == "b*" and self.operands[name].shape[0] != 1)

    def _along(self, name: str, dim: str, chunk: Chunk) -> Array:
        """An operand's slice along the queries or the keys; whole where it has none of its own for each."""
        x, dims = self.operands[name], self.spec.dims[name]
        if dim not in dims and (dim + "*" not in dims or x.shape[dims.index(dim + "*")] == 1):
            return x
        axis = dims.index(dim if dim in dims else dim + "*")
        return lax.slice_in_dim(x, chunk.offset, chunk.offset + chunk.size, axis=axis)

    # --- the sequence --------------------------------------------------------------------------------------------

    @cached_property
    def _travelling(self) -> list[str]:
        return [name for name in self.operands if "sk" in self.spec.dims[name]]

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
