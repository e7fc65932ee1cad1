"""Decode with `blocks` and boolean arrays: results of every kernel, and that it reads the tiles that rows see alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import checks
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pages
import pytest
from cases import Case, cu_seqlens, make_inputs, operands, varlen
from conftest import IMPLEMENTATION
from operand_calls import references, static_of

from jax_flash import flash_attention, masks, paged_attention
from jax_flash.autodiff import attend
from jax_flash.operands import OPTIONAL

GROUPS = {"hq": 4, "hk": 2}
ONE_TOKEN = Case("one token", b=5, sq=1, sk=700, kv_lengths=(700, 0, 64, 1, 333), **GROUPS)
CASES = [
    ONE_TOKEN,
    Case("drafts", b=3, sq=5, sk=640, kv_lengths=(640, 3, 200), causal=True, sinks=True, hq=8, hk=2),
    Case("heads for several columns", b=2, sq=2, sk=500, kv_lengths=(500, 77), hq=36, hk=1),
    Case("many sequences", b=40, sq=1, sk=150, window=(120, 0), hq=2, hk=2),
    Case("softcap", b=2, sq=3, sk=300, kv_lengths=(300, 129), softcap=2.0, alibi_slopes=(4,), **GROUPS),
    varlen("packed", (1, 0, 2, 1, 9, 1), k_sequences=(300, 4, 70, 0, 200, 520), padding=(3, 0), causal=True, **GROUPS),
]  # fmt: skip
BLOCKS = [(1, 1), (16, 16), (128, 128), (64, 32), (256, 208)]  # (1, 1): a boolean array
SPLITS = [{}, {"num_splits": 3}, {"batch_invariant": True}]


def splits(implementation):
    """Plain JAX does not split keys."""
    return SPLITS if implementation != "xla" else SPLITS[:1]


def rows_and_keys(case):
    packed = case.layout == "varlen"
    return (max(case.q_sequences), max(case.k_sequences)) if packed else (case.sq, case.sk)


def shown(case, block, heads, seed):
    """Which blocks of keys the blocks of rows see, a third of them; `heads` masks, each for as many query heads as the
    others; half of the seeds have one for each sequence. The last keys are past the last block."""
    rng = np.random.default_rng(seed)
    packed = case.layout == "varlen"
    entries = (len(case.q_sequences) if packed else case.b) if seed % 2 else 1
    rows, keys = rows_and_keys(case)
    seen = rng.random((entries, heads, -(-rows // block[0]), -(-(keys - 9) // block[1]))) < 0.3
    return seen if heads == 1 else seen.repeat(case.hq // heads, 1)


def in_pairs(case, seen, block):
    """The same mask as booleans [n | 1, h, rows, keys]."""
    rows, keys = rows_and_keys(case)
    pairs = seen.repeat(block[0], -2)[..., :rows, :].repeat(block[1], -1)[..., :keys]
    return np.pad(pairs, [(0, 0)] * 3 + [(0, keys - pairs.shape[-1])])


def by_token(case, seen):
    """The mask of single keys [n | 1, h, rows, keys] with a row for each packed token."""
    each = np.broadcast_to(seen, (len(case.q_sequences), *seen.shape[1:]))
    rows = [each[z, :, :n] for z, n in enumerate(case.q_sequences)]
    rows.append(np.ones((seen.shape[1], case.padding[0], seen.shape[-1]), bool))
    return np.concatenate(rows, 1)[None]


def check(call, case, block, heads, seed, implementation, **options):
    """The pages of `call` with a block mask beside the equations for the same pairs."""
    packed = case.layout == "varlen"
    dense = operands(call.inputs)
    seen = shown(case, block, heads, seed)
    pairs = dense | {"mask": jnp.asarray(in_pairs(case, seen, block))}
    right, low = references(case, static_of(case, call.inputs, dense), call.inputs, pairs)
    stored = by_token(case, seen) if packed and block[0] == 1 else seen
    kept = [name for name in ("sinks", "alibi_slopes") if name in dense]
    arrays = call.arrays | {name: dense[name] for name in kept} | {"block_mask": jnp.asarray(stored)}
    arrays |= {name: jnp.atleast_2d(arrays[name]) for name in ("k_scale", "v_scale") if name in arrays}
    static = replace(
        static_of(case, call.inputs, dense, implementation=implementation, block=block, **options),
        layout="paged_varlen" if packed else "paged",
        operands=tuple(name for name in OPTIONAL if name in arrays),
    )
    if call.is_shared:
        static = replace(static, value_dim=case.dv)
        arrays["value"] = arrays["key"]
    out, lse = map(np.asarray, attend(static, arrays)[:2])
    oracle.assert_out(out, right.out, low.out, softcap=bool(case.softcap))
    oracle.assert_lse(lse, right.lse)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rows_over_pages_see_their_blocks(case, block, dtype, kernel):
    """With another way to split keys, other pages and masks of one head, of KV heads or of query heads in turn."""
    i = CASES.index(case) + BLOCKS.index(block) + (dtype == "float32")
    d = 16 if kernel != "cuda" else (64, 128, 256, 512)[i % (4 if dtype == "bfloat16" else 2)]
    case = case.replace(d=d, dv=d, dtype=dtype)
    checks.require(kernel, dtype=dtype, d=d, dv=d)
    call = pages.paged(case.replace(alibi_slopes=None, sinks=False), size=(8, 64)[i % 2], seed=i)
    call = replace(call, inputs=make_inputs(case, i))
    check(call, case, block, (1, case.hk, case.hq)[i % 3], i, kernel, **SPLITS[i // 2 % 3])


@pytest.mark.parametrize("pool", pages.FLOAT8)
def test_pools_of_float8(pool, kernel):
    case = ONE_TOKEN.replace(d=64, dv=64, dtype="bfloat16")
    checks.require(kernel, d=64, dv=64)
    for i, block in enumerate(BLOCKS):
        call = pages.paged(case, size=16, pool_dtype=pool, seed=i, by_page=bool(i % 2))
        check(call, case, block, case.hk, i, kernel, **SPLITS[i % 3])


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_latent_pools(block, heads):
    i = BLOCKS.index(block)
    case = (CASES[0], CASES[1], CASES[5])[i % 3].replace(hq=heads, hk=1, d=576, dv=512, dtype="bfloat16")
    call = pages.latent(case.replace(sinks=False), 64, seed=i)
    pages.require(IMPLEMENTATION, case)
    call = replace(call, inputs=make_inputs(case, i))
    call.inputs.positional["value"] = call.inputs.positional["key"][..., :512]
    check(call, case, block, 1, i, IMPLEMENTATION, **SPLITS[i % 3])


@pytest.mark.parametrize("shared_kv", [False, True])
@pytest.mark.parametrize("shape", ["keys", "rows", "all"])
@pytest.mark.parametrize(
    "case", [*CASES[:4], CASES[4].replace(sk=8200, kv_lengths=(8200, 5000))], ids=lambda c: c.name
)
def test_arrays_over_contiguous_keys(case, shape, shared_kv, kernel):
    """A boolean mask, of which heads, rows or keys are broadcast, as Flax's caches give it."""
    i = CASES.index(case) if case in CASES else 4
    d = 16 if kernel != "cuda" else 512 if shared_kv else (64, 128)[i % 2]
    case = case.replace(d=d, dv=d, dtype="bfloat16", shared_kv=shared_kv)
    checks.require(kernel, d=d, dv=d)
    b, hq, sq, sk = case.b, case.hq, case.sq, case.sk
    sizes = {"keys": (b, 1, 1, sk), "rows": (1, hq, sq, 1), "all": (b, hq, sq, sk)}
    rng = np.random.default_rng(i)
    seen = rng.random(sizes[shape]) < 0.4
    if shape == "keys":  # a cache, whose keys past a position are hidden
        seen = np.arange(case.sk) < rng.integers(0, case.sk, case.b)[:, None, None, None]
    inputs = make_inputs(case, i)
    arrays = operands(inputs) | {"mask": jnp.asarray(seen)}
    right, low = references(case, static_of(case, inputs, arrays), inputs, arrays)
    static = static_of(case, inputs, arrays, implementation=kernel, **SPLITS[i % 3])
    out, lse = map(np.asarray, attend(static, arrays)[:2])
    oracle.assert_out(out, right.out, low.out, softcap=bool(case.softcap))
    oracle.assert_lse(lse, right.lse)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("array", [False, True])
def test_nan_in_blocks_that_no_row_sees_reaches_no_row(array, packed, kernel):
    """NaN in the pages of every block of 256 keys that the token's query heads do not choose."""
    checks.require_skipped_tiles(kernel)
    checks.require(kernel, d=64, dv=64)
    n, keys, size, block = 3, 4096, 64, 256
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((n, 1, 4, 64)), jnp.bfloat16)
    k, v = (jnp.asarray(rng.standard_normal((n * keys // size, size, 2, 64)), jnp.bfloat16) for _ in "kv")
    tables = jnp.arange(n * keys // size, dtype=jnp.int32).reshape(n, -1)
    chosen = np.stack([rng.permutation(keys // block)[:3] for _ in range(n)]).astype(np.int32)[:, None, None]
    seen = (np.arange(keys // block) == chosen[..., None]).any(-2)
    hidden = jnp.asarray(~seen[:, 0, 0].repeat(block // size, -1).reshape(-1))[:, None, None, None]
    mask = masks.dense(seen.repeat(block, -1)) if array else masks.blocks(chosen, (16, block))

    def run(k, v, **options):
        call = partial(paged_attention, implementation=kernel, mask=mask, **options)
        lengths = np.full(n, keys, np.int32)
        if not packed:
            return call(q, k, v, tables, lengths)
        return call(q[:, 0], k, v, tables, lengths, cu_seqlens_q=cu_seqlens((1,) * n))

    for options in SPLITS:
        wanted, got = (run(*x, **options) for x in ((k, v), [jnp.where(hidden, jnp.nan, x) for x in (k, v)]))
        np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted))


def test_mapped_calls_and_their_masks(implementation):
    """vmap over the mask alone, over queries alone, and over both."""
    checks.require(implementation, dtype="float32")
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((3, 2, 1, 4, 16)), jnp.float32)
    k, v = (jnp.asarray(rng.standard_normal((2, 300, 2, 16)), jnp.float32) for _ in "kv")
    seen = jnp.asarray(rng.random((3, 2, 1, 1, 300)) < 0.3)

    def run(implementation, q, seen):
        return flash_attention(q, k, v, mask=seen, implementation=implementation)

    for axes in ((None, 0), (0, None), (0, 0)):
        arguments = [x if axis == 0 else x[0] for x, axis in zip((q, seen), axes)]
        got, wanted = (jax.vmap(partial(run, name), axes)(*arguments) for name in (implementation, "xla"))
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)


def test_starts_that_no_sequence_has(implementation):
    """Packed starts that decrease, and ones outside of the arrays."""
    case = CASES[5].replace(d=64, dv=64)
    checks.require(implementation, dtype=case.dtype, d=64, dv=64)
    call = pages.paged(case, size=16)
    starts = jnp.array([-(2**31), 1, 0, 2**31 - 1, 5, 9, 3], jnp.int32)
    for block in ((1, 1), (16, 64)):
        seen = shown(case, block, 2, 1)
        stored = by_token(case, seen) if block[0] == 1 else seen
        arrays = call.arrays | {"cu_seqlens_q": starts, "block_mask": jnp.asarray(stored)}
        static = replace(
            static_of(case, call.inputs, {}, block=block),
            layout="paged_varlen",
            operands=tuple(name for name in OPTIONAL if name in arrays),
        )
        got, wanted = (
            attend(replace(static, implementation=name), arrays) for name in (implementation, "xla")
        )
        for x, y in zip(got[:2], wanted[:2]):
            np.testing.assert_allclose(np.float32(x), np.float32(y), rtol=2e-5, atol=2e-5)


def decode_step(seed, *, n=3, tokens=1, keys=600, heads=4, size=16, dtype=jnp.float32):
    """A step over shuffled pages: (q, k_pages, v_pages, tables, lengths), and contiguous keys and values."""
    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.standard_normal((n, tokens, heads, 16)), dtype)
    pages = -(-keys // size)
    k, v = (jnp.asarray(rng.standard_normal((n * pages, size, 2, 16)), dtype) for _ in "kv")
    tables = jnp.asarray(rng.permutation(n * pages).reshape(n, pages), jnp.int32)
    lengths = jnp.asarray([keys, *rng.integers(0, keys, n - 1)], jnp.int32)
    return (q, k, v, tables, lengths), [x[tables].reshape(n, pages * size, 2, 16)[:, :keys] for x in (k, v)]


OTHERS = {
    "two ranges": lambda n, keys: (
        masks.ranges(*(jnp.full((n, 1, 1), x, jnp.int32) for x in (3, 70)))
        | masks.ranges(*(jnp.full((n, 1, 1), x, jnp.int32) for x in (keys // 2, keys)))
    ),
    "a window in an array": lambda n, keys: masks.window(jnp.full(n, 150, jnp.int32), 0, keys - 1),
}


@pytest.mark.parametrize("array", [False, True])
@pytest.mark.parametrize("other", OTHERS)
def test_beside_other_masks(other, array, implementation):
    checks.require(implementation, dtype="float32")
    step, (k, v) = decode_step(1)
    n, keys = step[0].shape[0], k.shape[1]
    rng = np.random.default_rng(2)
    mask = masks.blocks(rng.permutation(keys // 32)[:9].astype(np.int32)[None, None, None], (16, 32))
    if array:
        mask = masks.dense(rng.random((n, 4, 1, keys)) < 0.4)
    mask &= OTHERS[other](n, keys)
    wanted = flash_attention(step[0], k, v, kv_lengths=step[-1], mask=mask, implementation="xla")
    for options in splits(implementation):
        got = paged_attention(*step, mask=mask, implementation=implementation, **options)
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)
    got = flash_attention(step[0], k, v, kv_lengths=step[-1], mask=mask, implementation=implementation)
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("array", [False, True])
def test_the_largest_score_of_visible_keys(array, implementation):
    checks.require(implementation, dtype="float32")
    step, _ = decode_step(3, tokens=2)
    rng = np.random.default_rng(4)
    chosen = np.stack([rng.permutation(18)[:4] for _ in range(2)])[None, :, None]
    mask = masks.blocks(chosen.astype(np.int32), (16, 32))
    if array:
        mask = masks.dense(rng.random((3, 1, 2, 600)) < 0.2)
    call = partial(paged_attention, *step, mask=mask, return_max=True)
    wanted = call(implementation="xla")
    for options in splits(implementation):
        for got, right in zip(call(implementation=implementation, **options), wanted):
            np.testing.assert_allclose(got, right, rtol=2e-5, atol=2e-5)


def test_two_mapped_axes(implementation):
    """The kernel starts once for each entry of all axes but the last, and its lists lie in the same memory."""
    checks.require(implementation, dtype="float32")
    step, _ = decode_step(5)
    rng = np.random.default_rng(6)
    seen = jnp.asarray(rng.random((2, 3, 3, 1, 1, 600)) < 0.3)
    chosen = jnp.asarray(np.argsort(rng.random((2, 3, 1, 2, 1, 18)))[..., :5], jnp.int32)

    def run(implementation, form, x):
        mask = masks.dense(x) if form == "array" else masks.blocks(x, (16, 32))
        return paged_attention(*step, mask=mask, implementation=implementation)

    for form, x in (("array", seen), ("blocks", chosen)):
        mapped = [jax.vmap(jax.vmap(partial(run, name, form)))(x) for name in (implementation, "xla")]
        np.testing.assert_allclose(*mapped, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("seen", [(40, 100), (70, 71), (333, 340)], ids=str)
def test_nan_before_the_first_visible_key_and_after_the_last(seen, paged, kernel):
    """These keys lie in the same tiles as visible ones."""
    checks.require_skipped_tiles(kernel)
    checks.require(kernel, dtype="float32")
    q, k, v, tables, _ = decode_step(7)[0]
    keys = np.arange(600)
    visible = (keys >= seen[0]) & (keys < seen[1])
    mask = masks.dense(visible[None, None, None])
    dense = [x[tables].reshape(3, -1, 2, 16)[:, :600] for x in (k, v)]
    wanted = flash_attention(q, *dense, mask=mask, implementation="xla")
    k, v = (jnp.where(visible[None, :, None, None], x, jnp.nan) for x in dense)
    if paged:
        k, v = (jnp.pad(x, ((0, 0), (0, 8), (0, 0), (0, 0))).reshape(-1, 16, 2, 16) for x in (k, v))
        tables = jnp.arange(3 * 38, dtype=jnp.int32).reshape(3, 38)
        got = paged_attention(q, k, v, tables, jnp.full(3, 600), mask=mask, implementation=kernel)
    else:
        got = flash_attention(q, k, v, mask=mask, implementation=kernel)
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("place", [(0, 0), (200, 0), (64, 192)], ids=str)
def test_blocks_of_a_larger_sequence(place, implementation):
    """The call's first row and key lie at a position of the sequence whose blocks these are."""
    case = ONE_TOKEN.replace(sq=3, d=64, dv=64, dtype="float32")
    checks.require(implementation, dtype="float32", d=64, dv=64)
    inputs = make_inputs(case)
    seen = np.random.default_rng(8).random((1, case.hq, 5, 16)) < 0.5
    arrays = operands(inputs) | {
        "block_mask": jnp.asarray(seen), "position": jnp.asarray(place, jnp.int32),
    }  # fmt: skip
    static = static_of(case, inputs, arrays, block=(64, 64))
    got, wanted = (attend(replace(static, implementation=name), arrays) for name in (implementation, "xla"))
    for x, y in zip(got[:2], wanted[:2]):
        np.testing.assert_allclose(np.float32(x), np.float32(y), rtol=2e-5, atol=2e-5)
