"""Boolean arrays as masks over several tiles, which CUDA kernels skip, mask by element, or take whole; both passes."""

from __future__ import annotations

import checks
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import Case, make_inputs, operands
from operand_calls import (
    GROUPS,
    HEAD_DIMS,
    SEVERAL_TILES,
    SINKS_AND_LENGTHS,
    SIZES,
    differentiate,
    references,
    static_of,
)

from jax_flash import flash_attention
from jax_flash.backends import compute_capability

CASES = [
    *SEVERAL_TILES,
    SINKS_AND_LENGTHS,
    Case("more queries", b=1, sq=450, sk=200, hq=3, hk=3),
    Case("517 keys", causal=True, **SIZES | GROUPS | {"sk": 517}),
    Case("500 keys", **SIZES | GROUPS | {"sk": 500}),
]


SHAPE = (GROUPS["hq"], SIZES["sq"], SIZES["sk"])
BESIDE = {  # options in addition to a mask
    "bias of every head": {"bias": (2, *SHAPE)},
    "bias of a row": {"bias": (1, 1, 1, SHAPE[2]), "causal": True},
    "dropout, softcap": {"dropout_rate": 0.3, "softcap": 2.0, "kv_lengths": (333, 520)},
    "slopes, sinks": {"alibi_slopes": (4,), "sinks": True, "window": (90, 40)},
    "segments": {"segments": 3, "q_lengths": (300, 77)},
}


def pictures(rows, keys):
    """Masks [rows, keys] of which tiles are empty, partial and whole, by name."""
    i, j = np.arange(rows)[:, None], np.arange(keys)[None]
    rng = np.random.default_rng(rows + keys)
    of = lambda at: np.searchsorted((50, 64, 200, 201, 390), at, "right")  # noqa: E731
    tiles = (-(-rows // 64), -(-keys // 64))
    chosen = rng.integers(3, size=tiles).repeat(64, 0).repeat(64, 1)[:rows, :keys]
    return {
        "prefix": (j <= i) | (j < 70),
        "documents": of(i) == of(j),
        "block diffusion": (i // 32 >= j // 32) & (j >= 64 * (i // 128)),
        "all but one pair": ~((i == rows // 2) & (j == keys // 3)),
        "one pair": (i == rows // 2) & (j == keys // 3),
        "tiles": np.choose(chosen, (np.zeros_like(i + j), np.ones_like(i + j), rng.random((rows, keys)) < 0.5)) > 0,
        "rows that see nothing": (i % 130 < 66) & (j >= 64),
        "both ends": ((j < 60) | (j >= 400)) & ((i < 70) | (i >= 210)),
        "all": np.ones((rows, keys), bool),
        "none": np.zeros((rows, keys), bool),
    }  # fmt: skip


NAMES = list(pictures(1, 1))


def check(case, mask, kernel, **options):
    checks.require(kernel, "forward", "backward", dtype=case.dtype, d=case.d, dv=case.dv)
    inputs = make_inputs(case)
    arrays = operands(inputs) | {"mask": jnp.asarray(mask)}
    got = differentiate(case, inputs, arrays, kernel, **options)
    oracle.assert_result(got, *references(case, static_of(case, inputs, arrays), inputs, arrays), case)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("d", [*HEAD_DIMS, 32])
def test_each_mask(d, name, dtype, kernel):
    """Every mask with one of the cases, and with other ones at the next dtype and head dim."""
    at = NAMES.index(name) + [*HEAD_DIMS, 32].index(d)
    i = at if at % 2 == (dtype == "bfloat16") else at + 3
    case = CASES[i % len(CASES)].replace(d=d, dv=d, dtype=dtype)
    check(case, pictures(case.sq, case.sk)[name][None, None], kernel)


def test_many_keys(kernel):
    """The list of a query tile is made 128 tiles of 64 keys at a time."""
    case = Case("many keys", b=1, sq=130, sk=9000, hq=2, hk=1, d=64, dv=64, dtype="bfloat16")
    tiles = np.random.default_rng(0).random((3, 141)) < 0.3
    check(case, tiles.repeat(64, 0).repeat(64, 1)[None, None, : case.sq, : case.sk], kernel)


@pytest.mark.parametrize("shown", [False, True])
def test_tiles_that_one_pair_makes_partial(shown, kernel):
    """Some tiles of each head show, or hide, one pair, in a block of 8 rows that differs between heads."""
    d = 128 if 128 in HEAD_DIMS else 64
    case = Case("pairs", b=1, sq=512, sk=512, hq=8, hk=2, d=d, dv=d, dtype="bfloat16")
    a, b = np.indices((8, 8))
    mask = np.full((1, 8, 512, 512), not shown)
    row, key = (
        64 * a + 8 * ((a + b) % 8) + (3 * a + b) % 8,
        64 * b + 8 * ((3 * a + b) % 8) + (5 * a + 3 * b) % 8,
    )
    mask[0, (a + b) % 8, row, key] = shown
    check(case, mask, kernel)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_options_of_a_call_with_a_mask(case, deterministic, kernel):
    d = 128 if 128 in HEAD_DIMS else 64
    mask = pictures(case.sq, case.sk)["tiles"][None, None]
    check(case.replace(d=d, dv=d, dtype="bfloat16"), mask, kernel, deterministic=deterministic)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", BESIDE)
def test_options_beside_a_mask(name, dtype, kernel):
    """Every option with a mask of each head, of which one sees nothing, and at the next dtype with one mask for all."""
    at = list(BESIDE).index(name) + ["float16", "bfloat16", "float32"].index(dtype)
    case = Case(name, d=64, dv=64, dtype=dtype, **SIZES | GROUPS | BESIDE[name])
    named = pictures(case.sq, case.sk)
    of_head = [named[x] for x in ("tiles", "none", "prefix", "documents")]
    check(
        case,
        np.stack(of_head)[None] if at % 2 else named["tiles"][None, None],
        kernel,
        deterministic=at % 3 == 1,
    )


@pytest.mark.parametrize("d", HEAD_DIMS if len(HEAD_DIMS) == 1 else (*HEAD_DIMS, 96, 192, 512))
@pytest.mark.parametrize("name", NAMES)
def test_each_mask_beside_an_option(d, name, kernel):
    """Kernels for several options visit the tiles from the first to the last that a mask shows, without a gap."""
    at = NAMES.index(name) + (64, 128, 256, 96, 192, 512).index(d)
    case = Case(name, d=d, dv=d, dtype=("float16", "bfloat16")[at % 2], **SIZES | GROUPS)
    case = case.replace(**list(BESIDE.values())[at % len(BESIDE)])
    if name == "one pair":  # with dropout, its gradient would be no more exact than out's rounding
        case = case.replace(dropout_rate=0.0)
    check(case, pictures(case.sq, case.sk)[name][None, None], kernel, deterministic=at % 3 == 1)


@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "one pair"])
def test_each_mask_with_dropout(d, name, kernel):
    """A mask and dropout, as where sequences are padded in training, have kernels together on Hopper."""
    at = NAMES.index(name)
    case = CASES[at % len(CASES)].replace(d=d, dv=d, dtype=("float16", "bfloat16")[at % 2], dropout_rate=0.3)
    check(case, pictures(case.sq, case.sk)[name][None, None], kernel, deterministic=at % 3 == 1)


@pytest.mark.parametrize("d", [32, *HEAD_DIMS])
@pytest.mark.parametrize("dropout_rate", [0.0, 0.3])
@pytest.mark.parametrize("name", NAMES)
def test_each_mask_with_a_bias(d, name, dropout_rate, kernel):
    """A mask and a bias of the call's dtype, with dropout too, have kernels together on Hopper."""
    at = NAMES.index(name) + (dropout_rate > 0) + d // 128
    dtype = ("float16", "bfloat16")[at % 2]
    case = CASES[(at + 1) % len(CASES)].replace(d=d, dv=d, dtype=dtype, dropout_rate=dropout_rate)
    if name == "one pair":
        case = case.replace(dropout_rate=0.0)
    shapes = [(1, case.hq, case.sq, case.sk), (case.b, case.hq, case.sq, case.sk), (case.b, 1, 1, case.sk)]
    case = case.replace(bias=shapes[at % 3], bias_dtype=dtype)
    check(case, pictures(case.sq, case.sk)[name][None, None], kernel, deterministic=at % 4 == 1)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("whole", ["b h rows keys", "b keys", "h rows", "rows keys", "b h keys", "h", ""])
def test_a_mask_broadcasts_over_any_dimension(whole, softcap, kernel):
    d = 128 if 128 in HEAD_DIMS else 64
    case = CASES[len(whole) % 4].replace(d=d, dv=d, dtype="bfloat16", softcap=softcap)
    sizes = {"b": case.b, "h": case.hq, "rows": case.sq, "keys": case.sk}
    shape = tuple(size if name in whole.split() else 1 for name, size in sizes.items())
    mask = np.random.default_rng(len(whole)).random(shape) < 0.6
    mask[..., np.arange(shape[3]) // 128 % 2 == 1] = True
    mask[:, :, 128:200] = False
    check(case, mask, kernel)


def runs_hopper_kernels(kernel):
    cards = [compute_capability(device) for device in jax.devices() if device.platform == "gpu"]
    return 90 in cards and checks.runs_cuda_kernels(kernel)


@pytest.mark.parametrize("d", HEAD_DIMS)
def test_elements_and_keys_that_are_not_in_use_reach_no_row(d, kernel):
    """The mask past the lengths, and NaN in keys that no length or tile of the mask shows."""
    case = Case(
        "lengths", b=2, sq=256, sk=512, hq=2, hk=1, d=d, dv=d, dtype="bfloat16", kv_lengths=(300, 450)
    )
    checks.require(kernel, "forward", "backward", dtype=case.dtype, d=d, dv=d)
    inputs = make_inputs(case)
    arrays = operands(inputs)
    key = np.arange(case.sk)
    past = key[None] >= np.array(case.kv_lengths)[:, None]  # [b, sk]
    hidden = key // 128 == 1
    mask = np.broadcast_to((pictures(256, 512)["prefix"] & ~hidden)[None, None], (2, 1, 256, 512))
    bad = jnp.asarray(past | hidden)[..., None, None]
    spoiled = {
        name: jnp.where(bad, jnp.nan, arrays[name]).astype(arrays[name].dtype) for name in ("key", "value")
    }
    wanted, got = (
        differentiate(case, inputs, arrays | own | {"mask": jnp.asarray(seen)}, kernel)
        for own, seen in (({}, mask), (spoiled, mask ^ past[:, None, None]))
    )
    np.testing.assert_array_equal(got.out, wanted.out)
    np.testing.assert_array_equal(got.lse, wanted.lse)
    for name, gradient in wanted.gradients.items():
        checks.assert_same_but_for_order(got.gradients[name], gradient, kernel)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_keys_of_another_half_of_the_rows_are_not_read(dtype, deterministic, kernel):
    """Rows of one half see keys of the same half alone: NaN in the other half's keys and rows changes no bit of theirs,
    at any head of a group, some of which see nothing or all of their half."""
    half, d = 384, HEAD_DIMS[0]  # a multiple of every kernel's tiles
    case = Case("halves", b=1, sq=2 * half, sk=2 * half, hq=6, hk=2, d=d, dv=d, dtype=dtype)
    checks.require(kernel, "forward", "backward", dtype=dtype, d=d, dv=d)
    if deterministic and dtype != "float32" and runs_hopper_kernels(kernel):
        pytest.skip("Hopper's repeatable backward visits the tiles that a mask hides (docs/masks.md)")
    inputs = make_inputs(case)
    arrays = operands(inputs)
    second = np.arange(2 * half) >= half
    mask = np.random.default_rng(1).random((1, 6, 2 * half, 2 * half)) < 0.5
    mask[:, 1, :half] = mask[:, 3, :half, :128] = mask[:, 4, :, :256] = False
    mask[:, 2] = True
    arrays["mask"] = jnp.asarray(mask & (second[:, None] == second))
    spoiled = arrays | {
        name: jnp.where(second[:, None, None], jnp.nan, arrays[name]).astype(dtype)
        for name in ("query", "key", "value")
    }
    wanted, got = (
        differentiate(case, inputs, each, kernel, deterministic=deterministic) for each in (arrays, spoiled)
    )
    np.testing.assert_array_equal(got.out[:, :half], wanted.out[:, :half])
    np.testing.assert_array_equal(got.lse[..., :half], wanted.lse[..., :half])
    for name in ("query", "key", "value"):
        one, other = (x.gradients[name][:, :half] for x in (got, wanted))
        checks.assert_same_but_for_order(one, other, kernel, deterministic=deterministic)


def test_a_compiled_call_reads_each_mask_anew(kernel):
    """What one call found of its mask must not serve another, nor the forward's mask the backward of another."""
    d = 128 if 128 in HEAD_DIMS else 64
    case = CASES[1].replace(d=d, dv=d, dtype="bfloat16")
    checks.require(kernel, "forward", "backward", dtype=case.dtype, d=d, dv=d)
    inputs = make_inputs(case)
    arrays = operands(inputs)
    qkv = [arrays[name] for name in ("query", "key", "value")]
    masks = [jnp.asarray(x)[None, None] for name, x in pictures(case.sq, case.sk).items()]

    @jax.jit
    def out_and_gradients(qkv, mask):
        run = lambda *x: flash_attention(*x, causal=True, mask=mask, implementation=kernel)  # noqa: E731
        out, pullback = jax.vjp(run, *qkv)
        return out, pullback(inputs.dout)

    first = [jax.device_get(out_and_gradients(qkv, mask)) for mask in masks]
    again = [jax.device_get(out_and_gradients(qkv, mask)) for mask in reversed(masks)][::-1]
    for mask, one, other in zip(masks, first, again, strict=True):
        alone = flash_attention(*qkv, causal=True, mask=mask, implementation=kernel)
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[0], alone)
        for a, b in zip(one[1], other[1], strict=True):
            checks.assert_same_but_for_order(a, b, kernel)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
def test_masks_under_vmap(axes, kernel):
    """A mapped mask is one more leading dimension, and an unmapped one is shared by its entries."""
    d = HEAD_DIMS[0]
    case = CASES[0].replace(d=d, dv=d, dtype="bfloat16", b=1)
    checks.require(kernel, "forward", dtype=case.dtype, d=d, dv=d)
    arrays = operands(make_inputs(case))
    named = pictures(case.sq, case.sk)
    masks = jnp.asarray(np.stack([named["tiles"], named["prefix"]]))[:, None, None]
    query = jnp.stack([arrays["query"], -arrays["query"]])
    given = [x if axis == 0 else x[0] for x, axis in zip((query, masks), axes)]

    def run(query, mask):
        return flash_attention(query, arrays["key"], arrays["value"], mask=mask, implementation=kernel)

    got = jax.vmap(run, axes)(*given)
    for i in range(2):
        one = run(*(x[i] if axis == 0 else x for x, axis in zip(given, axes)))
        np.testing.assert_array_equal(got[i], one)
