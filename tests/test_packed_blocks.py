"""Block masks of packed sequences over several tiles, dense and in pages: results of every pass, and what is read."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import checks
import equations
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import cu_seqlens, make_inputs, operands, spec, varlen
from operand_calls import HEAD_DIMS, differentiate, references, static_of
from pages import paged
from test_forward_mode import assert_near, rounded_tangents

from jax_flash import masks, paged_attention
from jax_flash.autodiff import attend
from jax_flash.operands import OPTIONAL

GROUPS = {"hq": 4, "hk": 2}
CASES = [
    varlen("every key", (200, 0, 77, 331), k_sequences=(330, 40, 90, 131), padding=(3, 5), **GROUPS),
    varlen("causal", (331, 1, 150), k_sequences=(400, 3, 90), causal=True, sinks=True, **GROUPS),
    varlen("window, lengths", (1, 300, 66), k_sequences=(70, 333, 9), window=(200, 30), kv_lengths=(50, 300, 9)),
]  # fmt: skip
BLOCKS = [(128, 128), (64, 64), (32, 96), (48, 16), (256, 160)]


def shown(case, block, heads, seed, part=0.3):
    """Which blocks of keys the blocks of rows see: `heads` different masks, repeated for all query heads; half of the
    seeds have one for each sequence. The last rows of the longest sequence are past the last block."""
    rng = np.random.default_rng(seed)
    entries = len(case.q_sequences) if seed % 2 else 1
    rows, columns = max(case.q_sequences) // block[0], -(-sum(case.k_sequences) // block[1])
    seen = rng.random((entries, heads, rows, columns)) < part
    seen[:, :, seed % rows] = False
    return seen if heads == 1 else seen.repeat(case.hq // heads, 1)


def in_pairs(case, seen, block):
    """The same mask as booleans [n | 1, h, rows, keys]."""
    rows, keys = max(case.q_sequences), max(case.k_sequences)
    pairs = seen.repeat(block[0], -2).repeat(block[1], -1)[..., :rows, :keys]
    return np.pad(pairs, [(0, 0)] * 2 + [(0, rows - pairs.shape[-2]), (0, 0)])


def with_blocks(case, block, heads, seed):
    """The inputs of a case, its operands with a block mask, and the equations' results for the same pairs."""
    inputs = make_inputs(case, seed)
    arrays = operands(inputs)
    seen = shown(case, block, heads, seed)
    pairs = arrays | {"mask": jnp.asarray(in_pairs(case, seen, block))}
    return (
        inputs,
        arrays | {"block_mask": jnp.asarray(seen)},
        references(case, static_of(case, inputs, arrays), inputs, pairs),
    )


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_rows_of_packed_sequences_see_their_blocks(block, dtype, deterministic, implementation):
    """Each block size with another case, and with masks of one head, of KV heads or of query heads in turn."""
    i = BLOCKS.index(block) + 2 * deterministic + (dtype == "float32")
    case = CASES[i % len(CASES)].replace(d=64, dv=64, dtype=dtype)
    checks.require(implementation, "forward", "backward", dtype=dtype, d=64, dv=64)
    inputs, arrays, right = with_blocks(case, block, (1, case.hk, case.hq)[i % 3], i)
    got = differentiate(case, inputs, arrays, implementation, block=block, deterministic=deterministic)
    oracle.assert_result(got, *right, case)


def test_starts_that_no_sequence_has(implementation):
    """Starts that decrease, and ones outside of the arrays."""
    case = CASES[0].replace(d=64, dv=64)
    checks.require(implementation, "forward", "backward", dtype=case.dtype, d=64, dv=64)
    starts = {
        "cu_seqlens_q": jnp.array([-(2**31), 200, 77, 2**31 - 1, 5], jnp.int32),
        "cu_seqlens_k": jnp.array([3, 2**31 - 1, -7, 90, 131], jnp.int32),
    }
    inputs = make_inputs(case)
    seen = shown(case, (64, 64), 2, 1)
    arrays = operands(inputs) | starts
    rows, keys = sum(case.q_sequences) + 3, sum(case.k_sequences) + 5
    wide = case.replace(q_sequences=(rows, 0, 0, 0), k_sequences=(keys, 0, 0, 0))
    pairs = {"mask": jnp.asarray(in_pairs(wide, seen, (64, 64)))}
    right = references(case, static_of(case, inputs, arrays), inputs, arrays | pairs)
    got = differentiate(
        case, inputs, arrays | {"block_mask": jnp.asarray(seen)}, implementation, block=(64, 64)
    )
    oracle.assert_result(got, *right, case)


# Sizes of which CUDA's tangents have rings of two stages, of one, and of none.
@pytest.mark.parametrize(("dtype", "d"), [("bfloat16", 64), ("bfloat16", 128), ("float32", 128)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_mode_sees_the_same(case, dtype, d, kernel):
    i = CASES.index(case)
    case = case.replace(d=d, dv=d, dtype=dtype)
    checks.require(kernel, "forward", "tangent", dtype=dtype, d=d, dv=d)
    inputs = make_inputs(case, i)
    seen = shown(case, BLOCKS[i], case.hk, i)
    moving, fixed = oracle.split(operands(inputs) | {"block_mask": jnp.asarray(seen)})
    tangents = jax.tree.map(lambda x: jnp.cos(7 * x), moving)
    run = static_of(case, inputs, moving | fixed, implementation=kernel, block=BLOCKS[i])
    _, got = jax.jvp(lambda x: attend(run, x | fixed), (moving,), (tangents,))
    pairs = operands(inputs) | {"mask": jnp.asarray(in_pairs(case, seen, BLOCKS[i]))}
    right = equations.tangents(spec(case, inputs), pairs, tangents)
    assert_near(case, got, right, rounded_tangents(case, pairs, inputs, tangents))


HALF = 256  # a multiple of every kernel's tiles


def halves(dtype, d, before):
    """A sequence whose rows see blocks of keys of the same half alone, after one of `before` tokens; some heads see
    nothing or all of their half. Returns the case, its blocks, and which tokens are of each half."""
    sequences = (before, 2 * HALF)
    case = varlen("halves", sequences, k_sequences=sequences, hq=6, hk=2, d=d, dv=d, dtype=dtype)
    of = np.arange(2 * HALF // 64) >= HALF // 64
    seen = np.random.default_rng(1).random((1, 6, of.size, of.size)) < 0.6
    seen[:, 1, :4] = seen[:, 3, :4, :2] = seen[:, 4, :, :3] = False
    seen[:, 2] = True
    token = np.arange(before + 2 * HALF) - before
    return case, seen & (of[:, None] == of), [(token >= 0) & (token // HALF == half) for half in (0, 1)]


def spoil(arrays, rows, dtype):
    """NaN in these tokens of query, key and value."""
    rows = rows[:, None, None]
    return arrays | {
        name: jnp.where(rows, jnp.nan, arrays[name]).astype(dtype) for name in ("query", "key", "value")
    }


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keys_of_another_half_of_the_rows_are_not_read(dtype, deterministic, kernel):
    """NaN in the keys and rows of one half changes no bit of the other half's."""
    checks.require_skipped_tiles(kernel)
    checks.require(kernel, "forward", "backward", dtype=dtype, d=64, dv=64)
    case, seen, (_, second) = halves(dtype, 64, before=7)
    inputs = make_inputs(case)
    arrays = operands(inputs) | {"block_mask": jnp.asarray(seen)}
    wanted, got = (
        differentiate(case, inputs, each, kernel, block=(64, 64), deterministic=deterministic)
        for each in (arrays, spoil(arrays, second, dtype))
    )
    np.testing.assert_array_equal(got.out[~second], wanted.out[~second])
    np.testing.assert_array_equal(got.lse[..., ~second], wanted.lse[..., ~second])
    for name in ("query", "key", "value"):
        one, other = (x.gradients[name][~second] for x in (got, wanted))
        checks.assert_same_but_for_order(one, other, kernel, deterministic=deterministic)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mask", ["packed blocks", "blocks", "array"])
def test_tangents_do_not_read_the_keys_of_another_half(mask, dtype, kernel):
    checks.require(kernel, "forward", "tangent", dtype=dtype, d=64, dv=64)
    packed = mask == "packed blocks"
    case, seen, in_half = halves(dtype, 64, before=7 * packed)
    if not packed:
        case = replace(case, layout="fixed", b=1, sq=2 * HALF, sk=2 * HALF)
    options = {"block": (64, 64)}
    hidden = {"block_mask": jnp.asarray(seen)}
    if mask == "array":
        options, hidden = {}, {"mask": jnp.asarray(seen.repeat(64, -2).repeat(64, -1))}
    inputs = make_inputs(case)
    moving, fixed = oracle.split(operands(inputs) | hidden)
    run = static_of(case, inputs, moving | fixed, implementation=kernel, **options)

    @jax.jit
    def tangent(moving):
        return jax.jvp(
            lambda x: attend(run, x | fixed), (moving,), (jax.tree.map(lambda x: jnp.cos(7 * x), moving),)
        )[1]

    wanted = tangent(moving)
    for own, other in (in_half, in_half[::-1]):
        got = tangent(spoil(moving, other, dtype))
        for a, b, tokens in zip(got, wanted, (-3, -1)):
            a, b = (np.moveaxis(np.float32(x), tokens, 0)[own] for x in (a, b))
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_pages_of_packed_sequences(block, size, implementation):
    i = BLOCKS.index(block)
    dtype, d = (
        ("bfloat16", 64) if size == 16 else ("float32", 128)
    )  # CUDA has rings of two stages, and of one
    case = CASES[i % len(CASES)].replace(d=d, dv=d, dtype=dtype, kv_lengths=None)
    checks.require(implementation, dtype=dtype, d=d, dv=d)
    _, arrays, (right, low) = with_blocks(case, block, (1, case.hk, case.hq)[i % 3], i)
    call = paged(case, size=size, seed=i)
    pages = call.arrays | {name: arrays[name] for name in ("sinks", "block_mask") if name in arrays}
    static = replace(
        static_of(case, call.inputs, arrays, implementation=implementation, block=block),
        layout="paged_varlen",
        operands=tuple(name for name in OPTIONAL if name in pages),
    )
    got = attend(static, pages)
    oracle.assert_out(np.asarray(got[0]), right.out, low.out)
    oracle.assert_lse(np.asarray(got[1]), right.lse)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("size", [16, 64])
def test_pages_of_another_half_are_not_read(size, d, packed, kernel):
    """NaN in pages that blocks, or the gap between two ranges, hide from a tile of rows."""
    checks.require(kernel, dtype="bfloat16", d=d, dv=d)
    before, keys = 7 * packed, 2 * HALF
    case, seen, (_, second) = halves("bfloat16", d, before)
    arrays = operands(make_inputs(case))
    pools = [
        jnp.pad(arrays[name][before:].reshape(-1, size, 2, d), ((1, 0), *[(0, 0)] * 3))
        for name in ("key", "value")
    ]
    tables = jnp.pad(jnp.arange(1, keys // size + 1, dtype=jnp.int32)[None], ((int(packed), 0), (0, 0)))
    lengths = jnp.array([before, keys][not packed :], jnp.int32)
    chosen = np.where(seen, np.arange(seen.shape[-1]), -1)
    ends = [jnp.full((1, before + keys), n, jnp.int32) for n in (0, 96, keys - 96, keys)]

    @partial(jax.jit, static_argnums=2)
    def run(k, v, blocks):
        two = masks.ranges(*ends[:2]) | masks.ranges(*ends[2:])
        mask = masks.blocks(chosen, (64, 64)) if blocks else two
        call = partial(paged_attention, implementation=kernel, mask=mask)
        if packed:
            return call(arrays["query"], k, v, tables, lengths, cu_seqlens_q=cu_seqlens(case.q_sequences))
        return call(arrays["query"][None], k, v, tables, lengths)[0]

    # No tile of 64 or 80 keys holds both a key that is seen and one of these.
    half, middle = slice(1 + HALF // size, None), slice(1 + 192 // size, 1 + (keys - 128) // size)
    for blocks, bad, rows in ((True, half, ~second), (False, middle, slice(None))):
        spoiled = [x.at[bad].set(jnp.nan) for x in pools]
        got, wanted = (np.float32(run(*x, blocks))[rows] for x in (spoiled, pools))
        np.testing.assert_array_equal(got, wanted)
