"""Every pass over a sequence that is split over devices: a ring of the same pass over its parts.

A device multiplies its own rows by the keys of one shard after the other (schedule.py) and joins the results in
float32 (sums.py). Keys come directly from the device that owns them, while the keys before them are multiplied; their
gradients go directly back. There are no leading dimensions here (vmap adds them).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from jax import Array, lax

from ..operands import BACKWARD, FORWARD, TANGENT, Pass
from ..spec import UNLIMITED, AttentionSpec
from .schedule import Range, Visit, Work
from .shard import Block, Call, Operands, Shard
from .sums import GRADIENTS, MERGED, MERGED_MAX, PAIRS, TANGENTS, Arrays, Total, merged_over, wide


def takes_blocks(spec: AttentionSpec, rows: int, keys: int) -> bool:
    """Whether parts of a call may have a block mask. `position` says where both the blocks and the diagonal begin,
    which is the same place unless lengths shift the diagonal."""
    shifted = spec.align == "bottom_right" and (
        rows != keys or {"q_lengths", "kv_lengths"} & {*spec.operands}
    )
    return not shifted or not (spec.limited or "alibi_slopes" in spec.operands)


def run(pass_: Pass, spec: AttentionSpec, operands: Operands, call: Call) -> list[Array]:
    """The results of one pass on this device; `call` runs a pass on a part."""
    # Without this XLA fetches keys once for forward and backward, and keeps them in between.
    if "dout" in operands:
        operands = lax.optimization_barrier(operands)
    assert spec.ring is not None
    rows = operands["query"].shape[1] * spec.ring.shards("queries")
    shard = Shard(pass_, _without_vacuous_bound(spec, rows), operands)
    if pass_ is FORWARD or pass_ is TANGENT:
        return _by_rows(shard, call)
    return _backward(shard, call) if pass_ is BACKWARD else _bias_gradient(shard, call)


def _without_vacuous_bound(spec: AttentionSpec, rows: int) -> AttentionSpec:
    """The spec without a limit on the right that hides no key, as that of a causal mask in a decode step: the diagonal
    of the last row ends at the last key, and that of the first one at most rows − 1 before it."""
    vacuous = spec.align == "bottom_right" and not spec.window_is_data and spec.right >= rows - 1
    return replace(spec, right=UNLIMITED) if vacuous else spec


def _by_rows(shard: Shard, call: Call) -> list[Array]:
    """out, lse and row_max, if requested; or the tangents of out and lse."""
    query = shard.operands["query"]
    merged = MERGED_MAX if shard.spec.row_max else MERGED
    total = Total(merged if shard.pass_ is FORWARD else TANGENTS, query.shape[1])
    for visit, work, block in _calls(shard, total):
        _add(shard, total, work.queries, tuple(shard.compute(call, visit, work, block)))
    out, *by_row = total.result()
    if shard.pass_ is FORWARD and shard.ring.whole == "queries":
        out, *by_row = merged_over(shard.ring, out, *by_row)
    # Without a barrier, XLA writes the result in float32 if it fuses it with a reader such as delta.
    joined: list[Array] = lax.optimization_barrier([out.astype(query.dtype), *by_row])
    return joined


def _backward(shard: Shard, call: Call) -> list[Array]:
    """dquery, dkey and, unless V is a part of K, dvalue.

    The first call on a device's own keys runs before all others, while the next keys arrive. The rest of its calls run
    at the end, while the last gradients return.
    """
    query, key = shard.operands["query"], shard.operands["key"]
    names, kind = (("key",), GRADIENTS) if shard.spec.shared_kv else (("key", "value"), PAIRS)
    dquery, dkv = Total(GRADIENTS, query.shape[1]), Total(kind, key.shape[1])

    def add(visit: Visit, work: Work, block: Block, found: Total) -> None:
        dq, *rest = shard.compute(call, visit, work, block)
        _add(shard, dquery, work.queries, (dq,))
        _add(shard, found, work.keys, tuple(rest), visit.start)

    for visit, work, block in _calls(shard, dquery):
        if visit.distance == 0:
            add(visit, work, block, dkv)
            continue
        if work is visit.work[0]:
            found = Total(kind, visit.size)
        add(visit, work, block, found)
        if work is visit.work[-1]:
            away = {name: x.astype(key.dtype) for name, x in zip(names, found.result(), strict=True)}
            home = shard.take(shard.send(away, [(there, here) for here, there in visit.route]))
            if len(dkv.parts) > 2:
                dkv.settle()
            dkv.add(visit.start, tuple(home[name] for name in names))
    (dq,) = dquery.result()
    return [dq.astype(query.dtype), *(x.astype(key.dtype) for x in dkv.result())]


def _bias_gradient(shard: Shard, call: Call) -> list[Array]:
    """The gradient of a bias, whose rows are this device's and whose columns are all keys of the sequence."""
    total, bias = None, shard.operands["bias"]
    for visit, work, block in _calls(shard, Total(GRADIENTS, 0)):
        (dbias,) = shard.compute(call, visit, work, block)
        total = shard.place(total, wide(dbias), visit, work)
    assert total is not None
    return [total.astype(bias.dtype)]


def _calls(shard: Shard, total: Total) -> Iterator[tuple[Visit, Work, Block]]:
    """The calls, each with its keys.

    During a visit only the keys of the next visit are in flight, so that memory does not grow with the number of
    devices: when the `total` of a visit is complete, the next keys are sent and those that have arrived are used. A
    forward of several calls fetches K during the first and V during the second, so that they need not be joined.
    """
    own = block = shard.block
    for n, visit in enumerate(shard.visits):
        following = next(iter(shard.visits[n + 1 :]), None)
        first, later = shard.halves(own) if shard.fetches_separately(visit) else (own, {})
        coming = shard.fetch(first, following) if following else {}
        for i, work in enumerate(visit.work):
            if i == 1 and later and following:
                coming, later = total.before((coming, later))
                coming |= shard.fetch(later, following)
            yield visit, work, block
        if following and following.distance and n:
            total.settle()
        if following and (n or shard.in_order):
            own, coming = total.before((own, coming))
        block = coming


def _add(shard: Shard, total: Total, part: Range, arrays: Arrays, begin: int = 0) -> None:
    """Adds the result of a call for a part of a shard; the total has the shard's tokens from `begin` on."""
    starts = part.starts(begin)
    for start in sorted(set(starts)):
        here = None if len(set(starts)) == 1 else shard.entry([int(x == start) for x in starts]) == 1
        total.add(start, arrays, here)
