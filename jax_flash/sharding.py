"""Partitions a pass over devices along batch, heads, leading dimensions and the sequence; all else is gathered.

The sharding rule tells XLA's propagation which dimensions correspond. `partition` then derives all shardings from that
of the pass's guide, query or k_pages; other operands only add axes of leading dimensions. Where query, key and value
are split alike over a sequence, or over a row of packed ones, it stays split, and each shard runs the pass in a ring
(sequence/passes.py). Where only query, or only key and value are, each shard has its rows and all keys, or its keys and
all rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from . import _jax
from ._jax import Region
from .batching import over_leading
from .operands import DELTA, DROPOUT_BATCH, DROPOUT_HEAD, Pass
from .sequence import packed, passes
from .sequence.sums import wide
from .spec import AttentionSpec, Ring, Spec, result_names

Axes = tuple[str, ...]
Body = Callable[..., Sequence[jax.Array]]
MARKER = "marker"  # an operand that is split over all free axes of a region, one by one
_NO_MESH = AbstractMesh((), ())
# By `Ring.whole`, the results to which all devices of a split sequence contribute.
_SUMS_OF_ALL = {"": (), "keys": ("dkey", "dvalue"), "queries": ("tout", "tlse", "dquery", "dbias")}


@cache
def partitioned(
    pass_: Pass, spec: Spec, names: tuple[str, ...], body: Body, region: Region | None
) -> Callable[..., Any]:
    """The pass as one partitionable function, whose name identifies the spec.

    If JAX is configured to remove the partitioners' names from the keys of the compilation cache, only this name
    distinguishes two specs there. In a partially manual region XLA partitions over the region's free axes.
    """

    def run(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(body(*arrays[: len(names)], spec=spec))  # a marker may follow

    rules = _Rules(pass_, spec, names, body, region)
    split = custom_partitioning(run)
    split.def_partition(rules.partition, sharding_rule=rules.sharding_rule, decode_shardings=False)

    def named(*arrays: jax.Array) -> Any:
        return split(*arrays)

    named.__name__ = named.__qualname__ = f"jax_flash_{pass_.name}_{spec.digest()}"
    return jax.jit(named)


@dataclass(frozen=True)
class Split:
    """The mesh axes of each dimension name.

    Query heads are split over `axes["hq"]`, KV heads over a prefix of these axes, `axes["hk"]`. Over the remaining
    ones, `kv_replicas`, KV is replicated, and each shard takes the KV heads that its query heads attend to.
    """

    axes: dict[str, Axes]
    kv_replicas: Axes = ()
    heads: int = 0  # query heads per shard
    group: int = 1  # query heads per KV head
    same_bias: Axes = ()  # axes along which all shards have the same bias
    ring: Ring | None = None

    def kv_slices(self) -> list[tuple[jax.Array, int]]:
        """Slices (first head, count) of the KV heads that this shard reads.

        One slice is enough if the shard has whole groups or part of one group. Otherwise its query heads belong to
        parts of several groups, and a KV head is read once for each `common` query heads: with 3 query heads per shard
        and groups of 4, the first shard reads the KV heads 0 0 0, the second 0 1 1.
        """
        first = lax.axis_index(self.kv_replicas) * self.heads
        common = math.gcd(self.heads, self.group)
        if common in (self.heads, self.group):
            return [(first // self.group, self.heads // common)]
        return [((first + head) // self.group, 1) for head in range(0, self.heads, common)]


@dataclass(frozen=True)
class _Rules:
    pass_: Pass
    spec: Spec
    names: tuple[str, ...]
    body: Body
    region: Region | None

    @property
    def operands(self) -> tuple[str, ...]:
        """The operands' names; with several free axes of a region the last one is the marker of their order."""
        return (*self.names, MARKER) if self.region and self.region.has_order else self.names

    @property
    def results(self) -> tuple[str, ...]:
        return result_names(self.pass_, self.spec)

    def dims(self, name: str, shape: Sequence[int]) -> list[str]:
        """The names of an array's dimensions: l0, l1, … for leading ones, "" for broadcast ones of size 1."""
        if name == MARKER:
            return [""] * len(shape)
        core = self.spec.dims[name]
        lead = [f"l{i}" for i in range(len(shape) - len(core))]
        named = [dim.rstrip("*") for dim in (*lead, *core)]
        may_be_one = [True] * len(lead) + [dim.endswith("*") for dim in core]
        return ["" if size == 1 and free else dim for dim, size, free in zip(named, shape, may_be_one)]

    def axis(self, name: str, dim: str) -> int:
        """The axis of a dimension in an operand, counted from the end."""
        dims = self.spec.dims[name]
        return dims.index(dim) - len(dims)

    def heads(self, shapes: dict[str, Sequence[int]]) -> tuple[int, int]:
        """The numbers of query heads and KV heads; without a query both are that of KV heads."""
        hk = shapes["key"][self.axis("key", "hk")]
        return (shapes["query"][self.axis("query", "hq")] if "query" in shapes else hk), hk

    def sequence_dims(self, shapes: dict[str, Sequence[int]]) -> tuple[str, ...]:
        """The sequence dimensions of queries and of keys if they may stay split, else ()."""
        if not isinstance(self.spec, AttentionSpec):
            return ()
        if self.spec.layout == "fixed":
            return "sq", "sk"
        return ("tq", "tk") if packed.may_be_ring(self.spec, shapes) else ()

    def sequence_factors(
        self, mesh: Any, shapes: dict[str, Sequence[int]]
    ) -> tuple[dict[str, str], dict[str, int]]:
        """Factors of the sequence dimensions in the rule, and sizes of new factors.

        Queries and keys share the factor "s", the greatest common divisor of their lengths, unless a mesh axis divides
        only one of them. Then keys have the factor "t", so that the one stays split without the other.
        """
        dims = self.sequence_dims(shapes)
        lengths = [shapes[name][-3] for name, _ in zip(("query", "key"), dims)]
        if not dims or _jax.same_dim(*lengths):
            return dict.fromkeys(dims, "s"), {}
        if any(map(_jax.is_symbolic, lengths)):
            return {}, {}
        common = math.gcd(*lengths)
        alone = (size for size in mesh.shape.values() if common % size)
        if common == 1 or any(tokens % size == 0 for size in alone for tokens in lengths):
            return dict(zip(dims, "st")), {}
        rest = {dim: size // common for dim, size in zip(dims, lengths) if size != common}
        # a dimension whose only factor is "s" gives "s" its size
        shared = {"s": common} if len(rest) == len(dims) else {}
        return {dim: f"(s {dim})" if dim in rest else "s" for dim in dims}, rest | shared

    # --- propagation ---------------------------------------------------------------------------------------------

    def sharding_rule(self, mesh: Any, operand_types: Sequence[Any], result_types: Sequence[Any]) -> Any:
        """The rule in Shardy's notation, e.g. 'b sq (h g) d, b sk h d, b sk h dv -> b sq (h g) dv, b (h g) sq'."""
        mesh = self.region.free if self.region else mesh
        names = (*self.operands, *self.results)
        arrays = [(n, t.shape) for n, t in zip(names, (*operand_types, *result_types), strict=True)]
        shapes = dict(arrays)
        hq, hk = self.heads(shapes)
        sizes: dict[str, int] = {}
        if hq == hk:
            heads = {"hq": "h", "hk": "h"}
        elif hk > 1 and all(hk % size == 0 for size in mesh.shape.values() if hq % size == 0):
            heads = {"hq": "(h g)", "hk": "h"}  # no factor of a compound may have size 1
            sizes["g"] = hq // hk
        else:
            heads = {}
        tokens, rest = self.sequence_factors(mesh, shapes)
        factor_of = heads | tokens
        sizes |= rest
        free = 0
        factors: list[list[str]] = []
        for name, shape in arrays:
            row = []
            for dim in self.dims(name, shape):
                free += not dim
                row.append(factor_of.get(dim, dim) if dim else f"u{free}")
            factors.append(row)
        replicated: list[str] = []
        for row in factors:
            for factor in row:
                splittable = (
                    factor in ("b", "s", "t", "h", "(h g)", "hq", "hk")
                    or factor[0] in "lu"
                    or factor[:2] == "(s"
                )
                if not splittable and factor not in replicated:
                    replicated.append(factor)
        text = [" ".join(row) for row in factors]
        count = len(self.operands)
        rule = ", ".join(text[:count]) + " -> " + ", ".join(text[count:])
        return rule, {"need_replication_factors": tuple(replicated), **sizes}

    # --- partitioning --------------------------------------------------------------------------------------------

    def partition(self, mesh: Any, operands: Any, results: Any) -> Any:
        """The mesh, the per-shard function, and the shardings of results and operands."""
        named = dict(zip(self.operands, operands))
        marker = named.pop(MARKER, None)
        free = mesh
        if self.region:
            mesh, free = self.region.mesh, self.region.free
            if marker:
                free = _jax.as_numbered(free, marker.sharding)
        split = self.split(free, named)

        def sharding(name: str, shape: Sequence[int]) -> NamedSharding:
            entries = [split.axes.get(dim) or None for dim in self.dims(name, shape)]
            return NamedSharding(free, PartitionSpec(*entries))

        operand_shardings = tuple(sharding(name, x.shape) for name, x in named.items())
        if marker:
            operand_shardings = (*operand_shardings, marker.sharding)
        result_shardings = tuple(sharding(name, x.shape) for name, x in zip(self.results, results))

        def shard(*arrays: jax.Array) -> tuple[jax.Array, ...]:
            with jax.sharding.use_abstract_mesh(_NO_MESH):  # explicit axes do not exist inside a shard
                return self.run_shard(split, *arrays)

        return mesh, shard, result_shardings, operand_shardings

    def split(self, mesh: Any, named: dict[str, Any]) -> Split:
        axes: dict[str, Axes] = {}
        used: set[str] = set()

        def claim(dim: str, candidates: Axes, size: int) -> None:
            free = tuple(axis for axis in candidates if axis not in used and axis not in head_axes)
            prefix = _dividing_prefix(mesh, free, size)
            if prefix and not axes.get(dim):
                axes[dim] = prefix
                used.update(prefix)

        guide = self.pass_.guide
        head_axes: Axes = ()
        for name, x in named.items():  # the guide comes first; others count only where it has no axis
            entries = _jax.dimension_axes(x, mesh)
            for dim, entry, size in zip(self.dims(name, x.shape), entries, x.shape):
                if dim.startswith("l") or (dim == "b" and name == guide):
                    claim(dim, entry, size)
                elif name == guide and dim in ("hq", "hk"):
                    head_axes = entry
        shapes = {name: x.shape for name, x in named.items()}
        found = _split_heads(mesh, axes, head_axes, *self.heads(shapes), used)
        tokens = self.sequence_dims(shapes)
        ring = self.ring(mesh, found, named) if tokens else None
        if ring:
            divided = [dim for dim, of in zip(tokens, ("queries", "keys")) if ring.whole != of]
            found = replace(found, axes=found.axes | dict.fromkeys(divided, ring.axes), ring=ring)
        if "bias" not in named:
            return found
        own = self.dims("bias", named["bias"].shape)
        same = [axis for dim in ("b", "hq", "sq") if dim not in own for axis in found.axes.get(dim, ())]
        return replace(found, same_bias=tuple(same))

    def ring(self, mesh: Any, split: Split, named: dict[str, Any]) -> Ring | None:
        """The ring, if the query, or key and value alike, are split over a sequence that can run as one. If both are
        not split alike, each device has all queries, or all keys."""
        query, key, value = (_jax.dimension_axes(named[name], mesh)[-3] for name in ("query", "key", "value"))
        rows, keys = (named[name].shape[-3] for name in ("query", "key"))
        taken = {axis for entry in split.axes.values() for axis in entry}

        def divides(axes: Axes, tokens: int) -> bool:
            return _size(mesh, axes) > 1 and tokens % _size(mesh, axes) == 0 and not taken & set(axes)

        if "block_mask" in named and not passes.takes_blocks(cast("AttentionSpec", self.spec), rows, keys):
            return None
        if divides(query, rows):
            whole = "" if query == key == value and divides(key, keys) else "keys"
            return Ring.on(mesh, query, _size(mesh, query), whole=whole)
        if key == value and divides(key, keys):
            return Ring.on(mesh, key, _size(mesh, key), whole="queries")
        return None

    def run_shard(self, split: Split, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        if self.pass_ is DELTA:  # each row by itself
            return tuple(self.body(*arrays[: len(self.names)], spec=self.spec))
        named = dict(zip(self.names, arrays))
        if "dropout" in named:
            named["dropout"] = self.with_offsets(split, named["dropout"], named["query"].shape)
        kv_heads = named["key"].shape[self.axis("key", "hk")]
        if split.kv_replicas:
            for name in [name for name in named if "hk" in self.spec.dims[name]]:
                named[name] = _taken(named[name], split.kv_slices(), self.axis(name, "hk"))
        results = (
            self.in_ring(split.ring, named) if split.ring else self.body(*named.values(), spec=self.spec)
        )
        return tuple(self.finish(name, x, split, kv_heads) for name, x in zip(self.results, results))

    def in_ring(self, ring: Ring, named: dict[str, jax.Array]) -> Sequence[jax.Array]:
        """The pass over this shard's part of the sequence."""
        whole = cast("AttentionSpec", self.spec)

        def call(pass_: Pass, spec: AttentionSpec, part: dict[str, jax.Array]) -> Sequence[jax.Array]:
            return self.body(*(part[name] for name in (*pass_.operands, *spec.operands)), spec=spec)

        def run(operands: dict[str, jax.Array]) -> list[jax.Array]:
            if whole.layout == "varlen":
                return packed.run(self.pass_, whole, ring, operands, call)
            return passes.run(self.pass_, replace(whole, ring=ring), operands, call)

        results: Sequence[jax.Array] = over_leading(run, whole, named)
        return results

    def with_offsets(self, split: Split, dropout: jax.Array, query_shape: Sequence[int]) -> jax.Array:
        """The dropout operand with this shard's offsets: bits depend on the global batch entry and query head."""
        for dim, slot in (("b", DROPOUT_BATCH), ("hq", DROPOUT_HEAD)):
            if split.axes.get(dim):
                size = query_shape[-4] if dim == "b" else query_shape[-2]
                offset = lax.axis_index(split.axes[dim]).astype(jnp.uint32) * jnp.uint32(size)
                dropout = dropout.at[..., slot].add(offset)
        return dropout

    def finish(self, name: str, x: jax.Array, split: Split, kv_heads: int) -> jax.Array:
        """Sums a gradient or tangent over the shards that contribute to it."""
        summed: Axes = ()
        if name in ("dkey", "dvalue") and split.kv_replicas:
            x = _put_back(x, split.kv_slices(), kv_heads)
            summed = split.kv_replicas
        elif name == "dbias":
            summed = split.same_bias
        if split.ring and name in _SUMS_OF_ALL[split.ring.whole]:
            # Float32, because each device adds a term that it has rounded.
            in_float32: jax.Array = lax.psum(wide(x), summed + split.ring.axes)
            return in_float32.astype(x.dtype)
        total: jax.Array = lax.psum(x, summed) if summed else x
        return total


def _size(mesh: Any, axes: Axes) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _dividing_prefix(mesh: Any, axes: Axes, size: int) -> Axes:
    """The longest prefix of the axes whose size divides `size`."""
    return next(axes[:n] for n in range(len(axes), -1, -1) if size % _size(mesh, axes[:n]) == 0)


def _split_heads(
    mesh: Any, axes: dict[str, Axes], candidates: Axes, hq: int, hk: int, used: set[str]
) -> Split:
    """Splits query heads over the longest prefix of query's head axes whose size divides them, and KV heads over the
    longest prefix of that one whose size divides them."""
    q_axes = _dividing_prefix(mesh, tuple(a for a in candidates if a not in used), hq)
    if not q_axes:
        return Split(axes)
    kv_axes = _dividing_prefix(mesh, q_axes, hk)
    return Split(
        axes | {"hq": q_axes, "hk": kv_axes}, q_axes[len(kv_axes) :], hq // _size(mesh, q_axes), hq // hk
    )


def _taken(x: jax.Array, slices: Sequence[tuple[jax.Array, int]], axis: int) -> jax.Array:
    """The slices of an axis, one after the other."""
    return jnp.concatenate([lax.dynamic_slice_in_dim(x, first, count, axis) for first, count in slices], axis)


def _put_back(x: jax.Array, slices: Sequence[tuple[jax.Array, int]], heads: int) -> jax.Array:
    """The transpose of _taken along the heads of […, h, d]; repeated parts are summed in float32."""
    whole = jnp.zeros((*x.shape[:-2], heads, x.shape[-1]), x.dtype if len(slices) == 1 else jnp.float32)
    at = 0
    for first, count in slices:
        part = x[..., at : at + count, :].astype(whole.dtype)
        part += lax.dynamic_slice_in_dim(whole, first, count, -2)
        whole = lax.dynamic_update_slice_in_dim(whole, part, first, -2)
        at += count
    return whole.astype(x.dtype)
