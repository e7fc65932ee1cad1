"""Every pass over a sequence that is split over devices: a ring of the same pass over its parts.

A device multiplies its own rows by the keys of one shard after the other (schedule.py) and joins the results, in
float32 (sums.py). Keys come straight from the device that owns them, while those before are multiplied; their gradients
go straight back. There are no leading dimensions here (vmap adds them).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jax import Array, lax

from ..operands import BACKWARD, FORWARD, TANGENT, Pass
from ..spec import AttentionSpec
from .schedule import Chunk, Range, Visit
from .shard import Call, Operands, Shard
from .sums import GRADIENTS, MERGED, PAIRS, TANGENTS, Arrays, Total, wide


def run(pass_: Pass, spec: AttentionSpec, operands: Operands, call: Call) -> list[Array]:
    """The results of one pass on this device; `call` runs a pass on a part."""
    if "dout" in operands:  # else XLA fetches keys once for forward and backward, and holds them in between
        operands = lax.optimization_barrier(operands)
    shard = Shard(pass_, spec, operands)
    if pass_ is FORWARD or pass_ is TANGENT:
        return _by_rows(shard, call)
    return _backward(shard, call) if pass_ is BACKWARD else _bias_gradient(shard, call)


def _by_rows(shard: Shard, call: Call) -> list[Array]:
    """out and lse, or their tangents."""
    query = shard.operands["query"]
    total = Total(MERGED if shard.pass_ is FORWARD else TANGENTS, query.shape[1])
    for visit, block in _visits(shard, total):
        for work in visit.work:
            _add(shard, total, work.queries, shard.queries, tuple(shard.compute(call, visit, work, block)))
    out, lse = total.result()
    return [out.astype(query.dtype), lse]


def _backward(shard: Shard, call: Call) -> list[Array]:
    query, key, value = (shard.operands[name] for name in ("query", "key", "value"))
    dquery, dkv = Total(GRADIENTS, query.shape[1]), Total(PAIRS, key.shape[1])
    for visit, block in _visits(shard, dquery):
        found = dkv if visit.distance == 0 else Total(PAIRS, visit.size)
        for work in visit.work:
            dq, *rest = shard.compute(call, visit, work, block)
            _add(shard, dquery, work.queries, shard.queries, (dq,))
            _add(shard, found, work.keys, shard.keys, tuple(rest), visit.start)
        if visit.distance:
            dk, dv = found.result()
            away = {"key": dk.astype(key.dtype), "value": dv.astype(value.dtype)}
            home = shard.send(away, [(there, here) for here, there in visit.route])
            if len(dkv.parts) > 2:
                dkv.settle()
            dkv.add(visit.start, (home["key"], home["value"]))
    (dq,), (dk, dv) = dquery.result(), dkv.result()
    return [dq.astype(query.dtype), dk.astype(key.dtype), dv.astype(value.dtype)]


def _bias_gradient(shard: Shard, call: Call) -> list[Array]:
    """The gradient of a bias, whose rows are this device's and whose columns are all keys of the sequence."""
    total, bias = None, shard.operands["bias"]
    for visit, block in _visits(shard, Total(GRADIENTS, 0)):
        for work in visit.work:
            (dbias,) = shard.compute(call, visit, work, block)
            total = shard.place(total, wide(dbias), visit, work)
    assert total is not None
    return [total.astype(bias.dtype)]


def _visits(shard: Shard, total: Total) -> Iterator[tuple[Visit, Operands]]:
    """The visits with their keys.

    The keys of the next visit are under way meanwhile, and no others, so that memory does not grow with the number of
    devices: they leave when the `total` of the visits before is there.
    """
    own = block = shard.block
    for n, visit in enumerate(shard.visits):
        following = shard.visits[n + 1 : n + 2]
        if n and following:
            own, parts = lax.optimization_barrier((own, [arrays for _, arrays in total.parts]))
            total.parts = [(start, arrays) for (start, _), arrays in zip(total.parts, parts, strict=True)]
        coming = [shard.fetch(own, after) for after in following]
        yield visit, block
        if n and following:
            total.settle()
        block = coming[0] if coming else block


def _add(
    shard: Shard, total: Total, part: Range, chunks: Sequence[Chunk], arrays: Arrays, begin: int = 0
) -> None:
    """Adds what a call gave for a part of a shard, whose tokens the total has from `begin` on."""
    starts = [chunks[c].offset + part.start - begin for c in part.chunk]
    for start in sorted(set(starts)):
        here = None if len(set(starts)) == 1 else shard.entry([int(x == start) for x in starts]) == 1
        total.add(start, arrays, here)
