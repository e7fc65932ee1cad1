"""The operand `ranges` in every layout, forward and backward, whatever numbers it holds."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import checks
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import Case, make_inputs, operands, spec, varlen
from conftest import IMPLEMENTATION
from operand_calls import differentiate, references, static_of
from pages import paged, rows_of

from jax_flash import flash_attention_varlen, masks, paged_attention
from jax_flash.autodiff import attend
from jax_flash.operands import OPTIONAL

SPAN = 2**31 - 1


SIZES = [
    Case("small"),
    Case("causal window", causal=True, window=(7, None), sq=19, sk=14),
    Case("lengths", q_lengths=(12, 5), kv_lengths=(7, 0)),
    Case("segments, mask and bias", segments=3, mask=(2, 1, 12, 12), bias=(1, 4, 12, 12)),
    Case("tiles", b=1, sq=150, sk=300, hq=2, hk=1),
    Case("tiles, causal", b=1, sq=300, sk=300, hq=3, hk=1, causal=True),
    Case("many keys", b=1, sq=70, sk=1300, hq=1, hk=1),
    Case("bfloat16", b=1, sq=150, sk=300, hq=2, hk=1, dtype="bfloat16", window=(200, 5)),
    Case("softcap, dropout, sinks", sq=40, sk=60, softcap=3.0, dropout_rate=0.3, sinks=True),
    Case("decode", sq=2, sk=200, hq=4, hk=1, causal=True),
    Case("decode, split", b=1, sq=1, sk=3000, hq=4, hk=1),
    varlen("packed", (5, 0, 9, 40), k_sequences=(7, 3, 150, 60), padding=(3, 2)),
    varlen("packed causal", (150, 1, 70), causal=True, kv_lengths=(90, 5, 70), hq=2),
]
HALF = {"sq": 200, "sk": 330, "dtype": "bfloat16"}
SIZES += [
    Case("head dim 64", **HALF, d=64, dv=64, causal=True),
    Case("head dim 128, lengths", **HALF, d=128, dv=128, q_lengths=(200, 77), kv_lengths=(300, 65)),
    Case("head dim 128, segments, bias", **HALF, d=128, dv=128, segments=3, bias=(1, 4, 200, 330)),
    Case("head dims 192 and 128", **HALF, d=192, dv=128, hq=2, window=(150, 20)),
    Case("head dim 256", **HALF, d=256, dv=256, hq=2, sinks=True),
    varlen("packed, head dim 128", (150, 1, 70, 260), causal=True, d=128, dv=128, dtype="bfloat16"),
]


def random_ranges(rng, shape, keys, count):
    """Limits in any order: some near the keys in use, some far, and a few anywhere in int32."""
    found = rng.integers(-3, keys + 4, (*shape, 2 * count))
    near = np.sort(found, -1)
    found = np.where(rng.random((*shape, 1)) < 0.8, near, found)
    wild = rng.integers(-SPAN - 1, SPAN, found.shape, endpoint=True)
    return jnp.asarray(np.where(rng.random(found.shape) < 0.03, wild, found), jnp.int32)


def with_ranges(case, seed, count, heads=1, entries=None):
    """The operands of a case and ranges. In one half of the rows, neighbours have similar ranges."""
    inputs = make_inputs(case, seed)
    arrays = operands(inputs)
    rng = np.random.default_rng(seed)
    packed = case.layout == "varlen"
    rows = arrays["query"].shape[0 if packed else 1]
    keys = max(case.k_sequences or case.q_sequences) if packed else case.sk
    lead = (heads,) if packed else (case.b if entries is None else entries, heads)
    ranges = random_ranges(rng, (*lead, rows), keys, count)
    smooth = random_ranges(rng, (*lead, -(-rows // 32)), keys, count).repeat(32, -2)[..., :rows, :]
    return inputs, arrays | {"ranges": jnp.where(jnp.arange(rows)[:, None] < rows // 2, smooth, ranges)}


@cache
def ranged(case, seed, count, heads):
    """with_ranges(), and the references, for all implementations."""
    inputs, arrays = with_ranges(case, seed, count, heads)
    return inputs, arrays, references(case, static_of(case, inputs, arrays), inputs, arrays)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("case", SIZES, ids=lambda case: case.name)
def test_a_row_sees_the_keys_of_its_ranges(case, count, implementation):
    checks.require_case(implementation, case)
    inputs, arrays, right = ranged(case, 3, count, case.hq if count == 1 else 1)
    oracle.assert_result(differentiate(case, inputs, arrays, implementation), *right, case)


def structured(name, size):
    """Limits [size, 4] of masks that models use: most tiles are visible as a whole or hidden, and many have gaps."""
    i, n = np.arange(size), size // 2
    none, zero = np.zeros((2, size), int)
    if name == "prefix":
        return np.stack([zero, np.maximum(i + 1, 150), none, none], -1)
    if name == "first and window":
        return np.stack([zero, np.minimum(30, i + 1), i - 100, i + 1], -1)
    block, noised = i % n // 40 * 40, i < n
    own = np.where(noised, block, n), np.where(noised, block + 40, n + block + 40)
    return np.stack([*own, zero + n, np.where(noised, n + block, n)], -1)  # block diffusion


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", ["prefix", "first and window", "block diffusion"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("d", [32, *checks.HOPPER_HEAD_DIMS])
def test_masks_of_models(d, packed, name, deterministic, implementation):
    sequences, common = (40, 640), {"hq": 4, "hk": 2, "d": d, "dv": d, "dtype": "bfloat16"}
    case = Case(name, b=1, sq=640, sk=640, **common)
    limits = structured(name, case.sq)[None, None]
    if packed:
        case = varlen(name, sequences, **common)
        limits = np.concatenate([structured(name, size) for size in sequences])[None]
    checks.require(implementation, dtype=case.dtype, d=d, dv=d)
    inputs = make_inputs(case)
    arrays = operands(inputs) | {"ranges": jnp.asarray(limits, jnp.int32)}
    got = differentiate(case, inputs, arrays, implementation, deterministic=deterministic)
    oracle.assert_result(got, *references(case, static_of(case, inputs, arrays), inputs, arrays), case)


WITH_OPTIONS = [
    Case("softcap, ALiBi, sinks", softcap=3.0, alibi_slopes=(8,), sinks=True),
    Case("softcap, dropout", softcap=3.0, dropout_rate=0.3),
    Case("bias, segments", bias=(1, 8, 650, 650), segments=3),
]


@pytest.mark.parametrize("name", ["first and window", "block diffusion"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", WITH_OPTIONS, ids=lambda case: case.name)
@pytest.mark.parametrize("d", checks.HOPPER_HEAD_DIMS if IMPLEMENTATION == "cuda" else (64,))
def test_masks_of_models_with_options(d, options, packed, name, kernel):
    """The general kernels, with lengths that no tile divides."""
    sequences = (30, 650)
    # The error of plain attention is the measure of a sink's gradient, and by chance it is small for two heads.
    case = replace(options, name=name, b=1, sq=650, sk=650, hq=8, hk=4, d=d, dv=d, dtype="bfloat16")
    limits = structured(name, case.sq)[None, None]
    if packed:
        if options.segments:
            pytest.skip("packed sequences have no segments")
        case = replace(case, layout="varlen", q_sequences=sequences, k_sequences=sequences, causal=True)
        limits = np.concatenate([structured(name, size) for size in sequences])[None]
    checks.require(kernel, dtype=case.dtype, d=d, dv=d)
    inputs = make_inputs(case)
    arrays = operands(inputs) | {"ranges": jnp.asarray(limits, jnp.int32)}
    got = differentiate(case, inputs, arrays, kernel)
    oracle.assert_result(got, *references(case, static_of(case, inputs, arrays), inputs, arrays), case)


@pytest.mark.parametrize("option", [{}, {"softcap": 3.0}], ids=lambda x: str(*x))
@pytest.mark.parametrize("d", checks.HOPPER_HEAD_DIMS if IMPLEMENTATION == "cuda" else (64,))
def test_rows_that_see_only_the_keys_after_a_gap(d, option, kernel):
    """Every second 64 rows. The others of their query tile see keys before the gap too."""
    case = Case("after a gap", b=1, sq=640, sk=640, hq=2, hk=1, d=d, dv=d, dtype="bfloat16", **option)
    checks.require(kernel, dtype=case.dtype, d=d, dv=d)
    both = np.arange(case.sq) % 128 < 64
    none = np.zeros(case.sq, int)
    limits = np.stack([none, np.where(both, 64, 0), none + 512, np.where(both, 576, 640)], -1)[None, None]
    inputs = make_inputs(case)
    arrays = operands(inputs) | {"ranges": jnp.asarray(limits, jnp.int32)}
    got = differentiate(case, inputs, arrays, kernel)
    oracle.assert_result(got, *references(case, static_of(case, inputs, arrays), inputs, arrays), case)


@pytest.mark.skipif(
    IMPLEMENTATION != "cuda", reason="only Hopper's kernels order sums by several tiles at once"
)
@pytest.mark.parametrize("hk", [1, 2])
@pytest.mark.parametrize("d", checks.HOPPER_HEAD_DIMS)
def test_ordered_sums_with_gaps(d, hk, kernel):
    """Sequences so long that a ticket covers several query tiles, of which a gap may hold some."""
    case = Case("block diffusion", b=1, sq=4480, sk=4480, hq=2, hk=hk, d=d, dv=d, dtype="bfloat16")
    checks.require(kernel, "forward", "backward", dtype=case.dtype, d=d, dv=d)
    inputs = make_inputs(case)
    limits = structured(case.name, case.sq)[None, None]
    arrays = operands(inputs) | {"ranges": jnp.asarray(limits, jnp.int32)}
    usual, *ordered = (
        differentiate(case, inputs, arrays, kernel, deterministic=x).gradients for x in (False, True, True)
    )
    for name, x in usual.items():
        x, first, again = (np.asarray(y, np.float32) for y in (x, *(run[name] for run in ordered)))
        np.testing.assert_array_equal(first, again)
        # The two round dS differently (test_long_groups_of_heads); the contract would allow five times as much.
        np.testing.assert_allclose(first, x, rtol=0.02, atol=0.002 * np.abs(x).max())


@pytest.mark.parametrize("d", checks.HOPPER_HEAD_DIMS)
def test_halves_of_key_tiles(d, implementation):
    """Blocks of 64 rows whose ranges begin and end in either half of a key tile. Some see only one half of a tile."""
    case = Case("halves", b=1, sq=640, sk=1024, hq=2, hk=1, d=d, dv=d, dtype="bfloat16")
    checks.require(implementation, dtype=case.dtype, d=d, dv=d)
    inputs = make_inputs(case)
    limits = np.sort(np.random.default_rng(d).integers(0, 33, (10, 4)) * 32, -1)
    limits[:4] = (0, 96, 256, 512), (64, 128, 256, 576), (32, 64, 384, 416), (96, 160, 480, 608)
    limits[1::2, 3] += 1  # rows that see one key of the next 32
    arrays = operands(inputs) | {"ranges": jnp.asarray(limits.repeat(64, 0)[None, None], jnp.int32)}
    got = differentiate(case, inputs, arrays, implementation)
    oracle.assert_result(got, *references(case, static_of(case, inputs, arrays), inputs, arrays), case)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}], ids=lambda x: str(*x))
def test_rows_of_no_sequence(options, implementation):
    """On CUDA more query tiles than SMs, and no sequence, so that no kernel looks for the keys that they see."""
    checks.require(implementation, dtype="bfloat16", d=64, dv=64)
    tokens = 4096 if implementation == "cuda" else 256
    x = jnp.ones((tokens, 16, 64), jnp.bfloat16)
    mask = masks.ranges(jnp.zeros((1, tokens), jnp.int32), jnp.full((1, tokens), tokens, jnp.int32))
    out, lse = flash_attention_varlen(
        x, x, x, jnp.zeros(1, jnp.int32), mask=mask, return_lse=True, implementation=implementation, **options
    )
    assert not out.any()
    assert (lse == -jnp.inf).all()


# In rows. Every query tile lies in one document. A key tile that holds two documents reaches into the BORDER of each,
# but not beyond.
DOCUMENT, BORDER = (128, 32) if IMPLEMENTATION == "cpu" else (768, 192)


# Tokens of another sequence before the documents, so that tiles of packed sequences begin at other rows.
BEFORE = 7


def documents(packed, heads, joined=False, **options):
    """A case of three documents in a row, their ranges, and [tokens]: the document, and whether in its middle.

    joined: rows of the first and the last document see both.
    """
    size = 3 * DOCUMENT
    document, at = np.divmod(np.arange(size), DOCUMENT)
    limits = np.stack([document * DOCUMENT, (document + 1) * DOCUMENT], -1)
    if joined:
        both = np.array([0, DOCUMENT, 2 * DOCUMENT, size])
        limits = np.where(document[:, None] == 1, np.pad(limits, ((0, 0), (0, 2))), both)
    middle = (at >= BORDER) & (at < DOCUMENT - BORDER)
    case = Case("documents", b=1, sq=size, sk=size, hq=2, hk=1, **options)
    if packed:
        case = varlen("documents", (BEFORE, size), hq=2, hk=1, **options)
        limits = np.pad(limits, ((BEFORE, 0), (0, 0)), constant_values=BEFORE)
        document, middle = np.pad(document, (BEFORE, 0), constant_values=-1), np.pad(middle, (BEFORE, 0))
    lead = (heads,) if packed else (1, heads)
    ranges = jnp.asarray(np.broadcast_to(limits, (*lead, *limits.shape)), jnp.int32)
    return case, ranges, document, middle


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("joined", [False, True])
def test_keys_that_no_row_of_a_tile_sees_are_stepped_over(
    joined, packed, heads, deterministic, dtype, kernel
):
    """NaN in the middle of a document reaches no row in the middle of another: no product reads both."""
    if joined:
        checks.require_skipped_tiles(kernel)
    case, ranges, document, middle = documents(packed, heads, joined, d=32, dv=32, dtype=dtype)
    checks.require(kernel, "forward", "backward", dtype=dtype, d=32, dv=32)
    inputs = make_inputs(case)
    moving, fixed = oracle.split(operands(inputs) | {"ranges": ranges})
    static = static_of(case, inputs, moving | fixed, deterministic=deterministic, implementation=kernel)
    for bad in (1,) if joined else range(3):
        hidden = jnp.asarray(middle & (document == bad))[:, None, None]
        spoiled = jax.tree.map(lambda x, hidden=hidden: jnp.where(hidden, jnp.nan, x), moving)
        got = oracle.differentiate(
            lambda x: attend(static, x | fixed), spoiled, jnp.where(hidden, jnp.nan, inputs.dout), inputs.dlse
        )
        for x in (got.out, *got.gradients.values()):
            x = np.asarray(x, np.float32)
            assert np.isfinite(x if packed else x[0])[middle & (document != bad)].all()


@pytest.mark.parametrize("option", [{}, {"softcap": 3.0}, {"dropout_rate": 0.3}], ids=lambda x: str(*x))
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("d", [32, *checks.HOPPER_HEAD_DIMS])
def test_keys_between_two_ranges_are_not_read(d, packed, option, kernel):
    checks.require_skipped_tiles(kernel)
    case, ranges, document, middle = documents(packed, 1, joined=True, d=d, dv=d, dtype="bfloat16", **option)
    checks.require(kernel, dtype=case.dtype, d=d, dv=d)
    arrays = operands(make_inputs(case)) | {"ranges": ranges}
    static = static_of(case, make_inputs(case), arrays, implementation=kernel)
    hidden = (middle & (document == 1))[:, None, None]
    spoiled = {name: jnp.where(hidden, jnp.nan, arrays[name]) for name in ("key", "value")}
    clean, got = (attend(static, arrays | x)[0] for x in ({}, spoiled))
    for x in (clean, got):
        assert x.shape[-3] == len(document)
    rows = document != 1
    np.testing.assert_array_equal(*(np.asarray(x, np.float32)[..., rows, :, :] for x in (got, clean)))


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("d", [32, 64, 128, 256, 512])
@pytest.mark.parametrize("size", [16, 64])
def test_pages_that_no_row_of_a_tile_sees_are_not_read(size, d, packed, joined, kernel):
    if joined:
        checks.require_skipped_tiles(kernel)
    case, ranges, document, middle = documents(packed, 1, joined, d=d, dv=d, dtype="bfloat16")
    checks.require(kernel, dtype=case.dtype, d=d, dv=d)
    rng = np.random.default_rng(d)
    q, k, v = (jnp.asarray(rng.standard_normal((len(document), h, d)), case.dtype) for h in (2, 1, 1))
    keys, starts = 3 * DOCUMENT, jnp.array([0, BEFORE, len(document)], jnp.int32)
    tables = jnp.arange(BEFORE, BEFORE + keys // size, dtype=jnp.int32)[None]
    mask = masks.ranges(ranges[..., 0], ranges[..., 1])
    if joined:
        mask |= masks.ranges(ranges[..., 2], ranges[..., 3])
    lengths = jnp.array([BEFORE, keys][not packed :], jnp.int32)
    if packed:
        tables = jnp.concatenate([jnp.zeros_like(tables), tables])

    @jax.jit
    def attend_to(k, v):
        pools = [jnp.pad(x[-keys:].reshape(-1, size, 1, d), ((BEFORE, 0), *[(0, 0)] * 3)) for x in (k, v)]
        call = partial(paged_attention, implementation=kernel, mask=mask)
        if packed:
            return call(q, *pools, tables, lengths, cu_seqlens_q=starts)
        return call(q[None], *pools, tables, lengths)[0]

    clean, own = np.asarray(attend_to(k, v)), document[-keys:] % 2 if joined else document[-keys:]
    right = oracle.plain_outs(*(x[None, -keys:] for x in (q, k, v)), (own[:, None] == own)[None])
    oracle.assert_out(clean[None, -keys:], *right)
    assert not clean[:-keys].any()  # rows of the sequence before have no ranges
    for bad in (1,) if joined else range(3):
        hidden = jnp.asarray(middle & (document == bad))[:, None, None]
        got = np.asarray(attend_to(*(jnp.where(hidden, jnp.nan, x) for x in (k, v))), np.float32)
        rows = middle & (document != bad)
        np.testing.assert_array_equal(got[rows], clean[rows])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["small", "decode", "packed", "packed causal"])
def test_forward_mode_sees_the_same(name, count, implementation):
    case = next(x for x in SIZES if x.name == name)
    inputs, arrays = with_ranges(case, 5, count, entries=1)
    static = static_of(case, inputs, arrays)
    moving, fixed = oracle.split(arrays)
    tangents = jax.tree.map(lambda x: jnp.cos(7 * x), moving)

    def tangent(implementation):
        run = replace(static, implementation=implementation)
        return jax.jvp(lambda x: attend(run, x | fixed), (moving,), (tangents,))[1]

    for got, wanted in zip(tangent(implementation), tangent("xla")):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize(("dtype", "d"), [("float32", 16), ("bfloat16", 128)])
def test_paged_rows_see_the_keys_of_their_ranges(dtype, d, tokens, packed, count, implementation):
    checks.require(implementation, dtype=dtype, d=d, dv=d)
    sequences = (tokens, 1, tokens + 2)
    common = {"causal": True, "dtype": dtype, "d": d, "dv": d}
    case = Case("pages", b=3, sq=tokens, sk=90, kv_lengths=(90, 3, 41), **common)
    if packed:
        case = varlen("pages", sequences, k_sequences=(90, 3, 41), **common)
    inputs, dense, (right, low) = ranged(case, 8, count, case.hq)
    call = paged(case, seed=8)
    static = static_of(case, inputs, dense)
    pages = replace(
        static,
        layout="paged_varlen" if packed else "paged",
        operands=tuple(n for n in OPTIONAL if n in call.arrays or n == "ranges"),
        implementation=implementation,
    )
    moving = {name: call.arrays[name] for name in ("query", "key", "value")}
    others = {name: x for name, x in call.arrays.items() if name not in moving} | {"ranges": dense["ranges"]}
    got = oracle.differentiate(lambda x: attend(pages, x | others), moving, inputs.dout, inputs.dlse)
    oracle.assert_out(got.out, right.out, low.out)
    oracle.assert_lse(got.lse, right.lse)
    oracle.assert_gradient("query", *(x.gradients["query"] for x in (got, right, low)))
    for name in ("key", "value"):
        in_pool = (call.pages.gradient(rows_of(case, x.gradients[name])) for x in (right, low))
        oracle.assert_gradient(name, got.gradients[name], *in_pool)


def test_only_pages_that_ranges_show_need_to_exist(implementation):
    case = Case("pages", b=1, sq=2, sk=32, kv_lengths=(32,), hq=2, hk=2)
    call = paged(case, size=8)
    arrays = call.arrays | {"block_tables": call.arrays["block_tables"].at[0, 1].set(10**6)}
    ranges = jnp.array([[[[0, 8, 16, 32], [0, 8, 16, 32]], [[0, 8, 16, 32], [0, 9, 16, 32]]]], jnp.int32)
    static = replace(
        spec(case, call.inputs), layout="paged", operands=tuple(n for n in OPTIONAL if n in arrays or n == "ranges"),
        implementation=implementation,
    )  # fmt: skip
    out, lse = attend(static, arrays | {"ranges": ranges})
    assert np.isnan(out).all(-1).tolist() == [[[False, False], [False, True]]]
    assert np.isnan(lse).tolist() == [[[False, False], [False, True]]]
