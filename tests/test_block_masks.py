"""The operand `block_mask` over several tiles: blocks of every size, one mask per head or for all, both passes."""

from __future__ import annotations

import checks
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import Case, make_inputs, operands
from operand_calls import (
    HEAD_DIMS,
    SEVERAL_TILES,
    SINKS_AND_LENGTHS,
    SIZES,
    differentiate,
    references,
    static_of,
)

CASES = [
    *SEVERAL_TILES,
    Case("sinks, a head for each", sinks=True, **SIZES | {"hq": 3, "hk": 3}),
    SINKS_AND_LENGTHS,
]
BLOCKS = [(128, 128), (64, 64), (128, 64), (64, 128), (32, 32), (96, 96), (256, 160), (48, 16)]


def shown(case, block, heads, seed, part=0.3):
    """Which blocks of keys each block of rows sees: `heads` different masks, repeated for all query heads."""
    rng = np.random.default_rng(seed)
    rows, columns = -(-case.sq // block[0]), -(-case.sk // block[1])
    seen = rng.random((case.b if seed % 2 else 1, heads, rows, columns)) < part
    seen[:, :, seed % rows] = False
    seen[:, :, :, columns // 2] |= rng.random(seen.shape[:3]) < 0.5
    return seen if heads == 1 else seen.repeat(case.hq // heads, 1)


def with_blocks(case, block, heads, seed, part=0.3):
    """The inputs of a case, its operands with a block mask, and those with the same mask as booleans."""
    inputs = make_inputs(case, seed)
    arrays = operands(inputs)
    seen = shown(case, block, heads, seed, part)
    pairs = seen.repeat(block[0], -2).repeat(block[1], -1)[..., : case.sq, : case.sk]
    return inputs, arrays | {"block_mask": jnp.asarray(seen)}, arrays | {"mask": jnp.asarray(pairs)}


def check(case, block, heads, implementation, seed=1, **options):
    checks.require(implementation, "forward", "backward", dtype=case.dtype, d=case.d, dv=case.dv)
    inputs, arrays, with_pairs = with_blocks(case, block, heads, seed)
    got = differentiate(case, inputs, arrays, implementation, block=block, **options)
    oracle.assert_result(
        got, *references(case, static_of(case, inputs, with_pairs), inputs, with_pairs), case
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_blocks_of_every_size(d, block, dtype, implementation):
    """Each block size runs with another case, and with masks of one head, of KV heads or of query heads in turn."""
    at = BLOCKS.index(block)
    i = at if at % 2 == (dtype == "bfloat16") else at + 3
    case = CASES[i % len(CASES)].replace(d=d, dv=d, dtype=dtype)
    check(case, block, (1, case.hk, case.hq)[i % 3], implementation, seed=i)


@pytest.mark.parametrize("block", [(64, 64), (32, 32)], ids=str)
def test_many_keys(block, implementation):
    """The list of a query tile is made 128 blocks of keys at a time."""
    case = Case("many keys", b=1, sq=130, sk=9000, hq=2, hk=1, d=64, dv=64, dtype="bfloat16")
    check(case, block, 1, implementation)


@pytest.mark.parametrize("of_query_heads", [False, True])
@pytest.mark.parametrize(
    ("heads", "block"), [((8, 2), (128, 128)), ((6, 2), (64, 64)), ((8, 1), (64, 192)), ((16, 1), (256, 64))]
)
def test_heads_of_a_kv_head_in_tiles_of_three_consumers(heads, block, of_query_heads, implementation):
    """The last tile of the same rows may have rows for two consumers alone."""
    case = SINKS_AND_LENGTHS.replace(hq=heads[0], hk=heads[1], d=64, dv=64, dtype="bfloat16")
    check(case, block, case.hq if of_query_heads else case.hk, implementation)


@pytest.mark.parametrize("block", [(128, 128), (64, 64)], ids=str)
def test_one_mask_for_the_heads_of_tiles_of_three_consumers(block, implementation):
    """With 128 rows the parts of a head lie in two query tiles, so neighbouring ones have other rows."""
    sizes = {"b": 1, "sq": 450, "sk": 450, "hq": 6, "hk": 2, "d": 64, "dv": 64}
    check(Case("causal", causal=True, dtype="bfloat16", **sizes), block, 1, implementation)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("block", [(128, 128), (64, 64)], ids=str)
def test_options_of_a_call_with_blocks(block, case, deterministic, implementation):
    d = 128 if 128 in HEAD_DIMS else 64
    case = case.replace(d=d, dv=d, dtype="bfloat16")
    check(case, block, case.hk, implementation, deterministic=deterministic)


@pytest.mark.parametrize("block", [(128, 128), (64, 64)], ids=str)
@pytest.mark.parametrize("part", [0.0, 1.0])
def test_no_block_and_all_blocks(part, block, implementation):
    case = CASES[1].replace(d=64, dv=64, dtype="bfloat16")
    checks.require(implementation, "forward", "backward", dtype=case.dtype, d=64, dv=64)
    inputs, arrays, _ = with_blocks(case, block, 1, 0, part)
    shape = -(-case.sq // block[0]), -(-case.sk // block[1])
    arrays["block_mask"] = jnp.full((1, 1, *shape), bool(part))
    got = differentiate(case, inputs, arrays, implementation, block=block)
    pairs = operands(inputs) | {"mask": jnp.full((1, 1, case.sq, case.sk), bool(part))}
    oracle.assert_result(got, *references(case, static_of(case, inputs, pairs), inputs, pairs), case)


@pytest.mark.parametrize("d", HEAD_DIMS)
def test_nan_in_keys_that_no_length_or_block_shows_reaches_no_row(d, kernel):
    """NaN past the lengths, and in blocks that no row of any head sees."""
    case = Case(
        "lengths", b=2, sq=256, sk=512, hq=2, hk=1, d=d, dv=d, dtype="bfloat16", kv_lengths=(300, 450)
    )
    checks.require(kernel, "forward", "backward", dtype=case.dtype, d=d, dv=d)
    inputs = make_inputs(case)
    arrays = operands(inputs)
    seen = np.zeros((1, 1, 2, 4), bool)
    seen[..., 0, [0, 2]] = seen[..., 1, [2, 3]] = True
    key = jnp.arange(case.sk)
    for bad in (
        key[None] >= jnp.array(case.kv_lengths)[:, None],
        jnp.broadcast_to(key // 128 == 1, (2, case.sk)),
    ):
        spoiled = arrays | {
            name: jnp.where(bad[..., None, None], jnp.nan, arrays[name]).astype(arrays[name].dtype)
            for name in ("key", "value")
        }
        mask = {"block_mask": jnp.asarray(seen)}
        wanted, got = (
            differentiate(case, inputs, each | mask, kernel, block=(128, 128), deterministic=True)
            for each in (arrays, spoiled)
        )
        np.testing.assert_array_equal(got.out, wanted.out)
        np.testing.assert_array_equal(got.gradients["query"], wanted.gradients["query"])
