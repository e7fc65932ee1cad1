"""Every pass over a sequence that is split over devices: a ring of the same pass over its parts.

A device multiplies its own rows by one shard of keys after the other (schedule.py) and adds up, in float32. A shard
comes straight from the device that owns it, while the one before is multiplied; the gradients of its keys go straight
back. There are no leading dimensions here (vmap adds them).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from ..merge import combine
from ..operands import BACKWARD, FORWARD, TANGENT, Pass
from ..spec import AttentionSpec
from .schedule import Visit
from .shard import Blocks, Call, Operands, Shard

Sums = list[Any]  # by chunk: None before the first addend


def run(pass_: Pass, spec: AttentionSpec, operands: Operands, call: Call) -> list[Array]:
    """The results of one pass on this device; `call` runs a pass on a part."""
    loop = {FORWARD: _forward, BACKWARD: _backward, TANGENT: _tangent}.get(pass_, _bias_gradient)
    if "dout" in operands:  # else XLA fetches keys once for forward and backward, and holds them in between
        operands = lax.optimization_barrier(operands)
    return loop(Shard(pass_, spec, operands), call)


def _forward(shard: Shard, call: Call) -> list[Array]:
    parts: Sums = [None] * len(shard.queries)  # (out, lse) of the keys so far, out in float32
    for visit, blocks in _visits(shard, parts):
        for q, k in visit.pairs:
            out, lse = shard.compute(call, visit, (q, k), blocks[k])
            parts[q] = combine(*zip(parts[q], (out, lse))) if parts[q] else (_plus(None, out), lse)
    outs, lses = zip(*parts)
    return [jnp.concatenate(outs, 1).astype(shard.operands["query"].dtype), jnp.concatenate(lses, 2)]


def _backward(shard: Shard, call: Call) -> list[Array]:
    dquery: Sums = [None] * len(shard.queries)
    home: list[Sums] = [[None] * len(shard.keys) for _ in ("key", "value")]
    for visit, blocks in _visits(shard, dquery):
        away: list[Sums] = [[None] * len(shard.keys) for _ in ("key", "value")]
        for q, k in visit.pairs:
            dq, *dkv = shard.compute(call, visit, (q, k), blocks[k])
            dquery[q] = _plus(dquery[q], dq)
            for sums, x in zip(away, dkv):
                sums[k] = _plus(sums[k], x)
        for sums, own, name in zip(away, home, ("key", "value")):
            for k, route in enumerate(visit.routes):
                if visit.distance and sums[k] is not None:
                    back = [(there, here) for here, there in route]
                    sums[k] = shard.send(sums[k].astype(shard.operands[name].dtype), back)
                if sums[k] is not None:
                    own[k] = _plus(own[k], sums[k])
    dtypes = (shard.operands[name].dtype for name in ("query", "key", "value"))
    return [jnp.concatenate(sums, 1).astype(dtype) for sums, dtype in zip((dquery, *home), dtypes)]


def _tangent(shard: Shard, call: Call) -> list[Array]:
    tout: Sums = [None] * len(shard.queries)
    tlse: Sums = [None] * len(shard.queries)
    for visit, blocks in _visits(shard, tlse):
        for q, k in visit.pairs:
            to, tl = shard.compute(call, visit, (q, k), blocks[k])
            tout[q], tlse[q] = _plus(tout[q], to), _plus(tlse[q], tl)
    return [jnp.concatenate(tout, 1).astype(shard.operands["query"].dtype), jnp.concatenate(tlse, 2)]


def _bias_gradient(shard: Shard, call: Call) -> list[Array]:
    """The gradient of a bias, whose rows are this device's and whose columns are all keys of the sequence."""
    total: Sums = [None]
    for visit, blocks in _visits(shard, total):
        for q, k in visit.pairs:
            (dbias,) = shard.compute(call, visit, (q, k), blocks[k])
            total[0] = shard.place(total[0], _plus(None, dbias), visit, (q, k))
    return [total[0].astype(shard.operands["bias"].dtype)]


def _visits(shard: Shard, results: Sums) -> Iterator[tuple[Visit, Blocks]]:
    """The visits with their keys. The keys of the next one are under way meanwhile, and no others, so that memory does
    not grow with the number of devices: they leave when the `results` of the visit before are there."""
    own = blocks = shard.blocks
    for n, visit in enumerate(shard.visits):
        following = shard.visits[n + 1 : n + 2]
        if n and following:
            own, results[:] = lax.optimization_barrier((own, results))
        coming = [shard.fetch(own, after) for after in following]
        yield visit, blocks
        blocks = coming[0] if coming else blocks


def _plus(total: Any, x: Array) -> Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return wide if total is None else total + wide
