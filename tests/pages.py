"""The paged equivalent of a dense case: numpy writes its keys into the pages of a pool one by one.

Memory that must not be read is poisoned: NaN in unused pages and in the tail of each sequence's last page,
and indices far outside the pool in unused table entries.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import checks
import jax
import jax.numpy as jnp
import numpy as np
import oracle
from cases import Case, Inputs, make_inputs

import jax_flash
from jax_flash.operands import MAX_HEAD_DIM

GARBAGE = (-(2**31), 2**31 - 1, -1, 10**6)
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True)
class Pages:
    """Where the keys of each sequence lie. `tables` [n, pages]; the pool has `count` pages of `size` slots."""

    tables: np.ndarray
    lengths: tuple[int, ...]
    size: int
    count: int
    layout: str = "nhd"

    def slots(self) -> Any:
        """(sequence, key, page, slot) of every key."""
        for z, length in enumerate(self.lengths):
            for j in range(length):
                yield z, j, int(self.tables[z, j // self.size]), j % self.size

    def pool(self, rows: list[np.ndarray], dtype: Any) -> jax.Array:
        """The pool that holds rows[z][j], of shape [h, d], as key j of sequence z."""
        pool = np.full((self.count, self.size, *rows[0].shape[1:]), np.nan, np.float32)
        for z, j, page, slot in self.slots():
            pool[page, slot] = rows[z][j]
        return jnp.asarray(self._in_layout(pool), dtype)

    def gradient(self, rows: list[np.ndarray]) -> np.ndarray:
        """The pool's gradient, from those of the keys: shared slots add up, unused ones have none."""
        total = np.zeros((self.count, self.size, *rows[0].shape[1:]))
        for z, j, page, slot in self.slots():
            total[page, slot] += rows[z][j]
        return self._in_layout(total)

    def _in_layout(self, pool: np.ndarray) -> np.ndarray:
        return pool if self.layout == "nhd" else np.swapaxes(pool, 1, 2)


def random_pages(lengths: tuple[int, ...], size: int, layout: str = "nhd", seed: int = 0) -> Pages:
    """Random pages for sequences of these lengths, one table entry more than they need, two pages too many."""
    rng = np.random.default_rng(seed)
    used = [-(-length // size) for length in lengths]
    order = rng.permutation(sum(used) + 2)
    tables = np.array(
        [[GARBAGE[(z + i) % 4] for i in range(max(used) + 1)] for z in range(len(lengths))], np.int32
    )
    for z, n in enumerate(used):
        tables[z, :n], order = order[:n], order[n:]
    return Pages(tables, tuple(lengths), size, sum(used) + 2, layout)


@dataclass(frozen=True)
class Paged:
    """A paged call and its dense equivalent. Arrays have the names of AttentionSpec's operands: key is k_pages."""

    case: Case
    inputs: Inputs  # of the dense case
    pages: Pages
    arrays: dict[str, jax.Array]
    start: int = 0  # the first column of V in a pool that K and V share

    @property
    def is_shared(self) -> bool:
        """Whether K and V share a pool."""
        return "value" not in self.arrays

    def call(self, implementation: str | None, **options: Any) -> Any:
        """arrays → (out, lse), except on GPUs in one program, which compiles sooner than its operations one by one."""

        def run(arrays: dict[str, jax.Array]) -> Any:
            positional = [
                arrays.pop(name, None) for name in ("query", "key", "value", "block_tables", "kv_lengths")
            ]
            static = {name: value for name, value in self.case.options.items() if name != "dropout_rate"}
            if self.is_shared:
                # The default of value_dim is d, which this way is tested too.
                given = None if self.start == 0 and self.case.dv == self.case.d else self.case.dv
                static |= {"value_dim": given, "value_start": self.start}
            return jax_flash.paged_attention(
                *positional, **arrays, **static | options, page_layout=self.pages.layout, return_lse=True,
                implementation=implementation,
            )  # fmt: skip

        whole = run if implementation == "cuda" else jax.jit(run)
        return lambda arrays: whole(self.arrays | arrays)


def paged(
    case: Case, size: int = 8, layout: str = "nhd", pool_dtype: str | None = None, seed: int = 0, by_page: bool = False
) -> Paged:  # fmt: skip
    """The keys of a fixed case (up to its kv_lengths) or of a varlen one (packed queries) in pages.

    by_page: float8 pools have scales [p, hk], NaN for pages that hold no key; else [hk].
    """
    inputs = make_inputs(case, seed)
    arrays = dict(inputs.positional | inputs.keywords)
    lengths = sequence_lengths(case)
    pages = random_pages(lengths, size, layout, seed)
    if case.layout == "varlen":
        del arrays["cu_seqlens_k"]
    scales = {}
    for name, scale in (("key", "k_scale"), ("value", "v_scale")):
        dense = np.asarray(arrays[name])
        if pool_dtype in FLOAT8:  # powers of two: what is stored times its scale is exact in every dtype
            by_head = 2.0 ** np.arange(-1, case.hk - 1, dtype=np.float32)
            scales[scale], factor = (
                jnp.asarray(by_head),
                np.broadcast_to(by_head[:, None], (*dense.shape[:-1], 1)),
            )
            if by_page:
                scales[scale], factor = random_scales(case, pages, factor.shape, seed + (name == "value"))
            factor = factor.astype(dense.dtype)
            stored = (dense / factor).astype(pool_dtype)
            inputs.positional[name] = jnp.asarray(stored.astype(dense.dtype) * factor)
            dense = stored
        arrays[name] = pages.pool(rows_of(case, np.asarray(dense, np.float32)), pool_dtype or case.dtype)
    arrays |= scales
    arrays["block_tables"] = jnp.asarray(pages.tables)
    arrays["kv_lengths"] = jnp.asarray(lengths, jnp.int32)
    return Paged(case, inputs, pages, arrays)


def latent(case: Case, *arguments: Any, **named: Any) -> Paged:
    """paged(), with the first dv columns of the keys as values, which have no pool of their own."""
    call = paged(case, *arguments, **named)
    call.inputs.positional["value"] = jnp.asarray(np.asarray(call.inputs.positional["key"])[..., : case.dv])
    for name in ("value", "v_scale"):
        call.arrays.pop(name, None)
    return call


def shared(
    case: Case, *arguments: Any, start: int | None = None, columns: int | None = None, **named: Any
) -> Paged:
    """paged(), with keys and values in the columns of one pool, values from `start` on; NaN in columns of neither."""
    call = paged(case, *arguments, **named)
    start = case.d if start is None else start
    assert start >= case.d
    key, value = (np.asarray(call.arrays.pop(name)) for name in ("key", "value"))
    pool = np.full((*key.shape[:-1], columns or start + case.dv), np.nan, key.dtype)
    pool[..., : case.d], pool[..., start : start + case.dv] = key, value
    call.arrays["key"] = jnp.asarray(pool)
    return dataclasses.replace(call, start=start)


def random_scales(
    case: Case, pages: Pages, shape: tuple[int, ...], seed: int
) -> tuple[jax.Array, np.ndarray]:
    """Scales [p, hk] from 1/4 to 4, NaN where a page holds no key, and those of the dense keys, of this shape."""
    chosen = 2.0 ** np.random.default_rng(seed).integers(-2, 3, (pages.count, case.hk)).astype(np.float32)
    scales, of_keys = np.full_like(chosen, np.nan), np.ones(shape, np.float32)
    rows = rows_of(case, of_keys)
    for z, j, page, _ in pages.slots():
        scales[page], rows[z][j] = chosen[page], chosen[page][:, None]
    return jnp.asarray(scales), of_keys


def sequence_lengths(case: Case) -> tuple[int, ...]:
    """Keys of each sequence."""
    if case.layout == "varlen":
        return case.q_sequences if case.k_sequences is None else case.k_sequences
    return case.kv_lengths or (case.sk,) * case.b


def rows_of(case: Case, dense: np.ndarray) -> list[np.ndarray]:
    """The keys (or their gradients) of each sequence, [length, h, d]."""
    lengths = sequence_lengths(case)
    if case.layout == "fixed":
        return [dense[z, :length] for z, length in enumerate(lengths)]
    ends = np.cumsum(lengths)
    return [dense[end - length : end] for end, length in zip(ends, lengths)]


def gathered(pool: Any, tables: Any, keys: int) -> np.ndarray:
    """The first keys of each table's pages in a pool of layout "nhd", [n, keys, h, d]."""
    found = np.asarray(pool)[np.clip(np.asarray(tables), 0, len(pool) - 1)]
    return found.reshape(len(found), -1, *pool.shape[2:])[:, :keys]


def references(call: Paged, *, gradients: bool) -> tuple[oracle.Result, oracle.Result]:
    """`exact` and `low` of the contract for the dense case, with the keys' gradients gathered into the pools."""
    found = oracle.references(call.case, call.inputs, gradients=gradients)
    return tuple(_to_pools(call, x) if gradients else x for x in found)  # type: ignore


def _to_pools(call: Paged, result: oracle.Result) -> oracle.Result:
    if call.is_shared:
        gradients = dict(result.gradients)
        width = call.arrays["key"].shape[-1]

        def in_pool(name: str, start: int) -> np.ndarray:
            x = np.asarray(gradients.pop(name), np.float64)
            return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(start, width - start - x.shape[-1])])

        gradients["key"] = in_pool("key", 0) + in_pool("value", call.start)
        result = dataclasses.replace(result, gradients=gradients)
    moved = {
        name: call.pages.gradient(rows_of(call.case, np.asarray(x, np.float64)))
        if name in ("key", "value")
        else x
        for name, x in result.gradients.items()
        if call.arrays[name].dtype not in FLOAT8
    }
    return dataclasses.replace(result, gradients=moved)


def run(call: Paged, implementation: str, *, gradients: bool, **options: Any) -> oracle.Result:
    """Out, lse and the gradients of query, pools (not float8 ones) and sinks."""
    function = call.call(implementation, **options)
    if not gradients:
        return oracle.Result(*map(np.asarray, function({})))
    moving, _ = oracle.split(call.arrays)
    moving = {name: x for name, x in moving.items() if x.dtype not in FLOAT8}
    return checks.differentiate(function, moving, call.inputs, at_once=implementation != "cuda")


def check(call: Paged, implementation: str, *, gradients: bool = False, **options: Any) -> oracle.Result:
    """Compares with the dense case at the contract's tolerance; returns the results."""
    require(implementation, call.case)
    got = run(call, implementation, gradients=gradients, **options)
    right, low = references(call, gradients=gradients)
    oracle.assert_result(got, right, low, call.case)
    return got


def require(implementation: str, case: Case | None = None) -> None:
    """Skips the test where the library has no paged kernels: they come with the append pass."""
    case = case or Case("any")
    forward = "forward" if case.d <= MAX_HEAD_DIM else "decode"  # which has the kernels of latent pools
    passes = ("append",) if implementation != "cuda" and forward == "decode" else (forward, "append")
    checks.require(implementation, *passes, dtype=case.dtype, d=case.d, dv=case.dv)


# Names for the rows of a test.


def named(rows: np.ndarray) -> str:
    """The rows where a condition holds, `[n, sq]` or packed `[tq]`: "sequence 0 row 3, sequence 2 row 0"."""
    words = ("sequence {} row {}" if rows.ndim == 2 else "packed row {}").format
    places = [words(*map(int, place)) for place in np.argwhere(rows)]
    return ", ".join(places[:6]) + (f" and {len(places) - 6} more" if len(places) > 6 else "")


def assert_nan_where(hit: np.ndarray, out: Any, lse: Any) -> None:
    """All of out and lse is NaN in the rows that need a missing page, and none of it in any other."""
    for name, x in _by_row(out, lse):
        number, nan = hit & ~np.isnan(x).all(-1), ~hit & np.isnan(x).any(-1)
        assert not number.any(), f"{name} is a number though a page is missing: {named(number)}"
        assert not nan.any(), f"{name} has NaN though no page is missing: {named(nan)}"


def assert_same_rows(rows: np.ndarray, got: tuple[Any, Any], wanted: tuple[Any, Any], why: str) -> None:
    """(out, lse) have the same bits in these rows."""
    for (name, x), (_, y) in zip(_by_row(*got), _by_row(*wanted), strict=True):
        other = rows & (x != y).any(-1)
        assert not other.any(), f"{name} has other bits {why}: {named(other)}"


def _by_row(out: Any, lse: Any) -> list[tuple[str, np.ndarray]]:
    """out and lse, reshaped so that the last dimension holds all numbers of a row."""
    out = np.asarray(out, np.float32)
    return [
        ("out", out.reshape(*out.shape[:-2], -1)),
        ("lse", np.moveaxis(np.asarray(lse), -2, -1)),
    ]
