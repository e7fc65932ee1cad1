"""The equations of docs/architecture.md in numpy, with gradients by hand: what reference.py is tested against.

The query heads that share a KV head are computed at once, sequence after sequence. All sums are in the dtype given
(float64: the right results); S, P and their gradients may be rounded to 16 bits in between. Nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jax_flash.spec import AttentionSpec

DIFFERENTIABLE = ("query", "key", "value", "bias", "sinks")
Array = np.ndarray
Arrays = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """out, lse and the gradients by operand name, as numpy arrays; out keeps its own dtype."""

    out: Array
    lse: Array
    gradients: dict[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """The query heads of one KV head in one sequence. Its matrices have a row for each head and query (the head's
    queries one after another), and a column for each key."""

    z: int
    kv_head: int
    heads: int
    first_query: int
    queries: int
    first_key: int
    keys: int

    @property
    def head_slice(self) -> slice:
        return slice(self.kv_head * self.heads, (self.kv_head + 1) * self.heads)

    @property
    def tokens(self) -> slice:
        return slice(self.first_query, self.first_query + self.queries)

    def of_queries(self, x: Array) -> Array:
        """The rows of query or of another array [..., hq, width]."""
        rows = x.reshape(-1, *x.shape[-2:])[self.tokens, self.head_slice]
        return np.swapaxes(rows, 0, 1).reshape(self.heads * self.queries, x.shape[-1])

    def set_queries(self, x: Array, rows: Array) -> None:
        rows = np.swapaxes(rows.reshape(self.heads, self.queries, x.shape[-1]), 0, 1)
        x.reshape(-1, *x.shape[-2:])[self.tokens, self.head_slice] = rows

    def of_keys(self, x: Array) -> Array:
        """The rows of key or value: a view, to which gradients can be added."""
        return x.reshape(-1, *x.shape[-2:])[self.first_key : self.first_key + self.keys, self.kv_head]

    def of_heads(self, x: Array) -> Array:
        """One number per query head, [hq], as a column."""
        return np.repeat(x[self.head_slice], self.queries)[:, None]

    def of_sinks(self, x: Array) -> Array:
        """Sinks, one per head or one per head and token, as a column."""
        return self.of_heads(x.reshape(-1)) if _is_shared(x) else self.of_queries(x[..., None])

    def of_scores(self, x: Array) -> Array:
        """An array that broadcasts to [b, hq, sq, sk]."""
        part = x[self.z if x.shape[0] > 1 else 0, self.head_slice if x.shape[1] > 1 else slice(None)]
        shape = (self.heads, self.queries, self.keys)
        part = np.broadcast_to(part[:, : self.queries, : self.keys], shape)
        return part.reshape(self.heads * self.queries, self.keys)

    def in_ranges(self, x: Array, j: Array) -> Array:
        """Whether the rows see the keys j by their ranges, [b | 1, hq | 1, sq, 2 | 4] or packed [hq | 1, tq, 2 | 4]."""
        own = x[:, self.tokens] if x.ndim == 3 else x[self.z if x.shape[0] > 1 else 0][:, : self.queries]
        own = own[self.head_slice] if x.shape[-3] > 1 else np.repeat(own, self.heads, 0)
        own = own.reshape(self.heads * self.queries, own.shape[-1]).astype(np.int64)
        inside = [(own[:, i, None] <= j) & (j < own[:, i + 1, None]) for i in range(0, own.shape[1], 2)]
        return np.any(inside, 0)

    def place(self) -> tuple[Array, Array]:
        """The positions of rows and columns in the sequence, i and j."""
        return np.tile(np.arange(self.queries), self.heads)[:, None], np.arange(self.keys)[None]

    def diagonal(self, spec: AttentionSpec) -> Array:
        i, _ = self.place()
        return i + self.keys - self.queries if spec.align == "bottom_right" else i


def _is_shared(sinks: Array) -> bool:
    """Whether all tokens have the same sinks, [1, 1, hq] or packed [1, hq]."""
    return sinks.size == sinks.shape[-1]


def numbers(operands: Arrays, dtype: Any) -> dict[str, Array]:
    """The operands as numpy arrays, floating-point ones in this dtype."""
    x = {name: np.asarray(array) for name, array in operands.items()}
    return {name: array if array.dtype.kind in "iub" else array.astype(dtype) for name, array in x.items()}


def groups(spec: AttentionSpec, x: dict[str, Array]) -> Iterator[Group]:
    hq, hk = x["query"].shape[-2], x["key"].shape[-2]
    for z, place in enumerate(_sequences(spec, x)):
        for kv_head in range(hk):
            yield Group(z, kv_head, hq // hk, *place)


def _sequences(spec: AttentionSpec, x: dict[str, Array]) -> list[tuple[int, int, int, int]]:
    """(first query token, queries, first key, keys) of each batch entry or sequence."""
    if spec.layout == "fixed":
        (b, sq), sk = x["query"].shape[:2], x["key"].shape[1]
        nq = [min(max(int(n), 0), sq) for n in x.get("q_lengths", [sq] * b)]
        nk = [min(max(int(n), 0), sk) for n in x.get("kv_lengths", [sk] * b)]
        return [(z * sq, nq[z], z * sk, nk[z]) for z in range(b)]
    cu_q, cu_k = (
        [max(min(max(int(c), 0), x[t].shape[0]) for c in x[name][: i + 1]) for i in range(x[name].size)]
        for name, t in (("cu_seqlens_q", "query"), ("cu_seqlens_k", "key"))
    )
    found = []
    for z in range(len(cu_q) - 1):
        nk = cu_k[z + 1] - cu_k[z]
        if "kv_lengths" in x:
            nk = min(nk, max(int(x["kv_lengths"][z]), 0))
        found.append((cu_q[z], cu_q[z + 1] - cu_q[z], cu_k[z], nk))
    return found


def _window(x: dict[str, Array], name: str, z: int) -> int | None:
    """A number of a window that is data."""
    numbers = x.get("window_" + name)
    return None if numbers is None else int(numbers[z if numbers.size > 1 else 0])


def visible(spec: AttentionSpec, x: dict[str, Array], group: Group) -> Array:
    """Whether each row sees each key."""
    (i, j), diagonal, z = group.place(), group.diagonal(spec), group.z
    seen = np.ones((i.size, j.size), bool)
    left, right = (_window(x, name, z) for name in ("left", "right"))
    diagonal = diagonal + (_window(x, "offset", z) or 0)
    if left is not None or spec.left >= 0:
        seen &= j >= diagonal - (spec.left if left is None else left)
    if right is not None or spec.right >= 0:
        seen &= j <= diagonal + (spec.right if right is None else right)
    if "q_segment_ids" in x:
        seen &= x["q_segment_ids"][z, i] == x["kv_segment_ids"][z, j]
    if "mask" in x:
        seen &= group.of_scores(x["mask"])
    if "ranges" in x:
        seen &= group.in_ranges(x["ranges"], j)
    if "bias" in x:
        seen &= group.of_scores(x["bias"]) != -np.inf
    if "draft_mask" in x and group.queries <= x["draft_mask"].shape[-1]:
        mask = x["draft_mask"][z if x["draft_mask"].shape[0] > 1 else 0]
        token = j - (group.keys - group.queries)  # the index of a new token; negative for keys before them
        seen &= (token < 0) | mask[i, np.maximum(token, 0)]
    return seen


def visible_pairs(spec: AttentionSpec, operands: Arrays) -> int:
    """The visible pairs of a query and a key of all batch entries and heads."""
    x = numbers({name: a for name, a in operands.items() if name != "dropout"}, np.float64)
    return sum(int(visible(spec, x, group).sum()) for group in groups(spec, x))


@dataclass(frozen=True)
class Softmax:
    """P and what its derivatives need; the sink is one more column of S, without a value."""

    p: Array
    of_sink: Array  # [rows, 1]
    lse: Array  # [rows, 1]
    slope: Array | float  # of the softcap


def _same(x: Array) -> Array:
    return x


def rounding(dtype: Any, round_to: Any) -> Callable[[Array], Array]:
    """A function that rounds to `round_to`, if it is given, and converts back to `dtype`."""
    return _same if round_to is None else lambda x: x.astype(round_to).astype(dtype)


def softmax(
    spec: AttentionSpec, x: dict[str, Array], group: Group, rounded: Callable[[Array], Array] = _same
) -> Softmax:
    """P = exp(S − lse), from S and sinks that are rounded."""
    s, slope = scores(spec, x, group, rounded)
    sink = np.full((s.shape[0], 1), -np.inf, s.dtype)
    if "sinks" in x:
        sink = rounded(group.of_sinks(x["sinks"]))
    largest = np.maximum(s.max(1, keepdims=True, initial=-np.inf), sink)
    nothing = np.isneginf(largest)
    largest = np.where(nothing, 0, largest).astype(s.dtype)
    e, of_sink = np.exp(s - largest), np.exp(sink - largest)
    total = np.where(nothing, 1, e.sum(1, keepdims=True) + of_sink).astype(s.dtype)
    lse = np.where(nothing, -np.inf, largest + np.log(total))
    return Softmax(e / total, of_sink / total, lse, slope)


def scores(
    spec: AttentionSpec, x: dict[str, Array], group: Group, rounded: Callable[[Array], Array] = _same
) -> tuple[Array, Array | float]:
    """S, −inf where a row does not see a key, and the slope of its softcap."""
    s = spec.scale * (group.of_queries(x["query"]) @ group.of_keys(x["key"]).T)
    seen, slope = visible(spec, x, group), 1.0
    bias = np.where(seen, group.of_scores(x["bias"]), 0) if "bias" in x else 0
    if spec.bias_first:
        s = s + bias
    if spec.softcap:
        s = spec.softcap * np.tanh(s / spec.softcap)
        slope = 1 - (s / spec.softcap) ** 2
    if not spec.bias_first:
        s = s + bias
    if "alibi_slopes" in x:
        slopes = x["alibi_slopes"][group.z if x["alibi_slopes"].shape[0] > 1 else 0]
        distance = np.abs(group.diagonal(spec) - group.place()[1]).astype(s.dtype)
        s = s - group.of_heads(slopes) * distance
    return np.where(seen, rounded(s), -np.inf).astype(s.dtype), slope


def largest(spec: AttentionSpec, operands: Arrays) -> Array:
    """The largest visible score of each batch entry or sequence and query head, `[b, hq]`; −inf where none is."""
    x = numbers(operands, np.float64)
    found = np.full((len(_sequences(spec, x)), x["query"].shape[-2]), -np.inf)
    for group in groups(spec, x):
        by_head = scores(spec, x, group)[0].reshape(group.heads, -1)
        found[group.z, group.head_slice] = by_head.max(1, initial=-np.inf)
    return found


def attention(
    spec: AttentionSpec,
    operands: Arrays,
    dout: Any,
    dlse: Any,
    *,
    dtype: Any = np.float64,
    round_to: Any = None,
    gradients: bool = True,
) -> Result:
    """Out, lse and the gradients, all in `dtype`; S, P and their gradients are rounded to `round_to`."""
    x = numbers(operands, dtype)
    dout, dlse = np.asarray(dout).astype(dtype), np.asarray(dlse).astype(dtype)
    dlse = np.swapaxes(dlse, -1, -2)[..., None]
    out = np.zeros(dout.shape, dtype)
    lse = np.full(dlse.shape, -np.inf, dtype)
    found = {name: np.zeros(x[name].shape, dtype) for name in DIFFERENTIABLE if name in x and gradients}
    sizes = x["query"].shape[0], x["query"].shape[-2], x["query"].shape[1], x["key"].shape[1]
    dbias = np.zeros(sizes, dtype) if "bias" in found else None

    rounded = rounding(dtype, round_to)
    for group in groups(spec, x):
        k, v = (group.of_keys(x[name]) for name in ("key", "value"))
        part, drop = softmax(spec, x, group, rounded), dropout(spec, x, group)
        p = drop(rounded(part.p))
        group.set_queries(out, p @ v)
        group.set_queries(lse, part.lse)
        if not gradients:
            continue
        do = group.of_queries(dout)
        dp = rounded(drop(do @ v.T))
        delta = (part.p * dp).sum(1, keepdims=True) - group.of_queries(dlse)
        ds = rounded(part.p * (dp - delta))
        if "sinks" in x:
            by_row = rounded(-part.of_sink * delta)
            if _is_shared(x["sinks"]):
                by_head = by_row.reshape(group.heads, group.queries).sum(1)
                found["sinks"][..., group.head_slice] += by_head
            else:
                group.set_queries(found["sinks"][..., None], by_row)
        of_product = ds * part.slope
        if dbias is not None:
            by_score = of_product if spec.bias_first else ds
            square = by_score.reshape(group.heads, group.queries, group.keys)
            dbias[group.z, group.head_slice, : group.queries, : group.keys] = square
        ds = spec.scale * of_product
        group.set_queries(found["query"], ds @ k)
        group.of_keys(found["key"])[:] += ds.T @ group.of_queries(x["query"])
        group.of_keys(found["value"])[:] += p.T @ do
    if dbias is not None:
        broadcast = tuple(axis for axis in range(4) if x["bias"].shape[axis] != dbias.shape[axis])
        found["bias"] = dbias.sum(broadcast, keepdims=True)
    return Result(out, np.swapaxes(lse[..., 0], -1, -2), found)


def tangents(
    spec: AttentionSpec, operands: Arrays, moved: Arrays, *, dtype: Any = np.float64, round_to: Any = None
) -> tuple[Array, Array]:
    """The tangents of out and lse. `moved` has the tangents of query, key and value and, if they have any, of
    bias and sinks. S, P and their tangents are rounded as in attention()."""
    x, t = numbers(operands, dtype), numbers(moved, dtype)
    tout = np.zeros((*x["query"].shape[:-1], x["value"].shape[-1]), dtype)
    tlse = np.zeros((*x["query"].shape[:-1], 1), dtype)
    rounded = rounding(dtype, round_to)
    for group in groups(spec, x):
        part, drop = softmax(spec, x, group, rounded), dropout(spec, x, group)
        (q, tq), (k, tk), (v, tv) = (
            (of(x[name]), of(t[name]))
            for name, of in (("query", group.of_queries), ("key", group.of_keys), ("value", group.of_keys))
        )
        moved_bias = group.of_scores(t["bias"]) if "bias" in t else 0
        ts = spec.scale * (tq @ k.T + q @ tk.T)
        ts = (ts + moved_bias) * part.slope if spec.bias_first else ts * part.slope + moved_bias
        ts = rounded(ts)
        of_lse = (part.p * ts).sum(1, keepdims=True)
        if "sinks" in t:
            of_lse += part.of_sink * rounded(group.of_sinks(t["sinks"]))
        group.set_queries(tlse, of_lse)
        group.set_queries(tout, drop(rounded(part.p * (ts - of_lse))) @ v + drop(rounded(part.p)) @ tv)
    return tout, np.swapaxes(tlse[..., 0], -1, -2)


# Dropout.


def dropout(spec: AttentionSpec, x: dict[str, Array], group: Group) -> Callable[[Array], Array]:
    """A function that sets the dropped elements of P to zero and scales the others up."""
    if "dropout" not in x:
        return _same
    i, j = group.place()
    h = group.of_heads(np.arange(x["query"].shape[-2]))
    kept = dropout_number(x["dropout"], group.z, h, i, j) >= round(spec.dropout_rate * 32768)
    return lambda p: np.where(kept, p / (1 - spec.dropout_rate), 0).astype(p.dtype)


def dropout_number(words: Any, z: int, h: Any, i: Any, j: Any) -> Any:
    """The 15-bit numbers that decide about elements (i, j) of heads: half j % 2 of word j // 8 % 4 of their Philox
    block. The second eight rows of sixteen take the same words, rotated by a byte."""
    key0, key1, z0, h0, i0, j0 = map(int, words)
    h, i, j = (np.asarray(a, np.uint64) + np.uint64(first) for a, first in ((h, h0), (i, i0), (j, j0)))
    block = philox((key0, key1), (j // 32 * 4 + j // 2 % 4, i // 16 * 8 + i % 8, h, z + z0))
    word = np.choose((j // 8 % 4).astype(int), np.broadcast_arrays(*block))
    word = np.where(i % 16 >= 8, (word >> 8) + (word % 256 << 24), word)
    return word >> 16 * (j % 2) & 0x7FFF


def philox(key: tuple[int, int], counter: tuple[Any, Any, Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-7 in integers of at least 64 bits, or arrays of them."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(7):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3
