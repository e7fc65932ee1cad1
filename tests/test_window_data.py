"""A window that is data: plain kernels run it in every layout and pass, whatever its numbers are."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from itertools import pairwise

import checks
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import Case, make_inputs, operands, varlen
from conftest import IMPLEMENTATION
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from operand_calls import differentiate, references, static_of
from pages import paged
from plans import plan
from programs import require_devices

import jax_flash
from jax_flash import flash_attention, flash_attention_varlen, masks, paged_attention
from jax_flash.autodiff import attend
from jax_flash.operands import OPTIONAL, WINDOW
from jax_flash.reference import band_limits
from jax_flash.spec import AttentionSpec

END = 2**31 - 1
NUMBERS = {
    "a window": {"window_left": (9, 70, 3), "window_right": (0, 5, 300)},
    "one for all": {"window_left": (64,)},
    "an offset": {"window_right": (0, 3, 0), "window_offset": (2, -7, 100)},
    "a window and an offset": {"window_left": (30, 2, 0), "window_offset": (-3, 40, 15)},
    "nothing": {"window_left": (-1, -END - 1, 5), "window_right": (0, 2, -6)},
    "any numbers": {
        "window_left": (END, -END - 1, END),
        "window_right": (END, 3, -END - 1),
        "window_offset": (END, -END - 1, -END - 1),
    },
}
HALF = {"dtype": "bfloat16", "sq": 200, "sk": 330}
SIZES = [
    Case("small", align="top_left"),
    Case("causal", align="top_left", causal=True, sq=150, sk=170),
    Case("lengths", q_lengths=(12, 5), kv_lengths=(7, 0)),
    Case("segments, mask and bias", segments=3, mask=(2, 1, 12, 12), bias=(1, 4, 12, 12)),
    Case("softcap, dropout, sinks", sq=40, sk=60, softcap=3.0, dropout_rate=0.3, sinks=True),
    Case("decode", sq=1, sk=3000, hq=4, hk=1),
    varlen("packed", (5, 0, 150), k_sequences=(7, 3, 160), padding=(3, 2)),
    Case("head dim 64", **HALF, d=64, dv=64),
    Case("head dim 128, lengths", **HALF, d=128, dv=128, q_lengths=(200, 77), kv_lengths=(300, 65)),
    Case("head dim 128, segments", **HALF, d=128, dv=128, segments=3),
    Case("head dim 128, bias", **{**HALF, "sk": 328}, d=128, dv=128, bias=(1, 4, 200, 328)),
    Case("head dim 256", **HALF, d=256, dv=256, hq=2),
    varlen("packed, head dim 128", (150, 1, 260), causal=True, d=128, dv=128, dtype="bfloat16"),
]


def numbers(name, case):
    """The operands of a window: one number for each batch entry or sequence, or one for all."""
    entries = len(case.q_sequences) or case.b
    made = {key: np.array(x[:entries], np.int32) for key, x in NUMBERS[name].items()}
    if case.causal:
        made.pop("window_right", None)
    return {key: jnp.asarray(x) for key, x in made.items()}


@cache
def windowed(case, name):
    inputs = make_inputs(case, 3)
    arrays = operands(inputs) | numbers(name, case)
    return inputs, arrays, references(case, static_of(case, inputs, arrays), inputs, arrays)


@pytest.mark.parametrize("deterministic", [False, True] if IMPLEMENTATION == "cuda" else [False])
@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("case", SIZES, ids=lambda case: case.name)
def test_every_pass_sees_the_window(case, name, deterministic, implementation):
    checks.require_case(implementation, case)
    inputs, arrays, right = windowed(case, name)
    got = differentiate(case, inputs, arrays, implementation, deterministic=deterministic)
    oracle.assert_result(got, *right, case)


@pytest.mark.parametrize("name", NUMBERS)
def test_the_limits_are_those_of_unlimited_integers(name):
    diagonal = np.arange(40)[None].repeat(3, 0)
    arrays = {key: np.array(x).repeat(3 // len(x)) for key, x in NUMBERS[name].items()}
    offset = arrays.get("window_offset", np.zeros(3, int))[:, None]
    spec = AttentionSpec("fixed", align="top_left", right=7)
    given = {key: jnp.asarray(x, jnp.int32) for key, x in NUMBERS[name].items()}
    first, last = band_limits(spec, given, jnp.asarray(diagonal, jnp.int32), jnp.arange(3)[:, None])
    wanted = diagonal + offset + arrays.get("window_right", np.full(3, 7))[:, None]
    keys = np.arange(-1, 60)[:, None, None]
    np.testing.assert_array_equal(keys <= np.asarray(last), keys <= wanted)
    if "window_left" not in arrays:
        assert first is None
        return
    wanted = diagonal + offset - arrays["window_left"][:, None]
    np.testing.assert_array_equal(keys >= np.asarray(first), keys >= wanted)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize(("dtype", "d"), [("float32", 16), ("bfloat16", 128)])
def test_pages(dtype, d, tokens, packed, name, implementation):
    checks.require(implementation, dtype=dtype, d=d, dv=d)
    common = {"dtype": dtype, "d": d, "dv": d}
    case = Case("pages", b=3, sq=tokens, sk=90, kv_lengths=(90, 3, 41), **common)
    if packed:
        case = varlen("pages", (tokens, 1, tokens + 2), k_sequences=(90, 3, 41), **common)
    inputs, dense, (right, low) = windowed(case, name)
    call = paged(case, seed=3)
    window = {key: dense[key] for key in NUMBERS[name]}
    pages = replace(
        static_of(case, inputs, dense),
        layout="paged_varlen" if packed else "paged",
        operands=tuple(n for n in OPTIONAL if n in call.arrays or n in window),
        implementation=implementation,
    )
    moving = {key: call.arrays[key] for key in ("query", "key", "value")}
    others = {key: x for key, x in call.arrays.items() if key not in moving} | window
    got = oracle.differentiate(lambda x: attend(pages, x | others), moving, inputs.dout, inputs.dlse)
    oracle.assert_out(got.out, right.out, low.out)
    oracle.assert_lse(got.lse, right.lse)
    oracle.assert_gradient("query", *(x.gradients["query"] for x in (got, right, low)))


def test_only_pages_that_the_window_shows_need_to_exist(implementation):
    checks.require(implementation, dtype="float32")
    rng = np.random.default_rng(2)
    q, k, v = (
        jnp.asarray(rng.standard_normal(x), jnp.float32) for x in ((2, 1, 2, 16), *[(8, 8, 2, 16)] * 2)
    )
    tables = jnp.array([[0, 10**6, 2, 3], [4, 5, 10**6, 7]], jnp.int32)
    mask = masks.window(jnp.array([15, 15], jnp.int32), 0, offset=31)
    out = paged_attention(q, k, v, tables, jnp.full(2, 32), mask=mask, implementation=implementation)
    assert np.isnan(out).all((1, 2, 3)).tolist() == [False, True]
    assert not np.isnan(out[0]).any()


WINDOWS = {
    "equal and few": (lambda n: n * 0 + 300, lambda n: n),
    "equal and many": (lambda n: n * 0 + END, lambda n: n),
    "different": (lambda n: np.where(np.arange(len(n)) % 2, 60, 2000), lambda n: n),
    "before the last keys": (lambda n: n * 0 + 100, lambda n: n - 500),
    "none": (lambda n: n * 0 - 1, lambda n: n),
}


@pytest.mark.parametrize("sequences", [2, 16, 40])
@pytest.mark.parametrize("d", [64, 128, 256] if IMPLEMENTATION == "cuda" else [16])
@pytest.mark.parametrize("name", WINDOWS)
def test_decode_of_long_sequences(name, d, sequences, kernel):
    """With few KV heads the device decides, by the window, whether clusters or equal shares of all keys are faster."""
    checks.require(kernel, d=d, dv=d)
    rng = np.random.default_rng(sequences)
    size, most, heads, kv_heads = 64, 4096, 8, 4
    pages = most // size
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)  # noqa: E731
    q, k, v = draw(sequences, 1, heads, d), draw(160, size, kv_heads, d), draw(160, size, kv_heads, d)
    tables = jnp.asarray(rng.integers(0, 160, (sequences, pages)), jnp.int32)
    left, offset = (np.asarray(f(np.full(sequences, most - 1)), np.int64) for f in WINDOWS[name])
    numbers = [jnp.asarray(x, jnp.int32) for x in (left, offset)]
    at = np.arange(most)
    seen = (at >= (offset - left)[:, None]) & (at <= offset[:, None])
    keys, values = (x[tables].reshape(sequences, most, kv_heads, d) for x in (k, v))
    wanted = oracle.plain_outs(q, keys, values, seen[:, None])
    mask = masks.window(numbers[0], 0, offset=numbers[1])

    def compare(got):
        oracle.assert_out(np.asarray(got), *wanted)

    lengths, starts = jnp.full(sequences, most), jnp.arange(sequences + 1, dtype=jnp.int32)
    compare(flash_attention(q, keys, values, mask=mask, implementation=kernel))
    for options in ({}, {"num_splits": 3}, {"batch_invariant": True}):
        call = partial(paged_attention, implementation=kernel, mask=mask, **options)
        compare(call(q, k, v, tables, lengths))
        compare(call(q[:, 0], k, v, tables, lengths, cu_seqlens_q=starts)[:, None])


@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_plain_kernels_take_windows(pass_):
    for options in ({}, {"varlen": True}, {"right": 0}):
        chosen = plan(pass_, operands=WINDOW, **options)
        assert chosen["score"] == "plain"
        assert chosen["text"] == plan(pass_, **options)["text"]


def test_flops_count_the_visible_pairs():
    x, left = np.zeros((2, 48, 4, 16), np.float32), np.array([3, 70], np.int32)
    count = partial(jax_flash.flops, flash_attention, x, x, x)
    pairs = sum(min(i, 3) + 1 for i in range(48)) + sum(i + 1 for i in range(48))
    assert count(mask=masks.window(left, 0)) == 4 * 16 * 4 * pairs
    moved = sum(max(0, min(i - 2, 3) + 1) for i in range(48)) + sum(i + 1 for i in range(46))
    assert count(mask=masks.window(left, 0, np.int32(-2))) == 4 * 16 * 4 * moved
    unknown = jax.ShapeDtypeStruct((2,), np.int32)
    assert count(mask=jax.tree.map(lambda _: unknown, masks.window(left, 0, left))) == 4 * 16 * 4 * 2 * 48**2


def test_a_vmapped_window(kernel):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((3, 2, 40, 2, 16)), jnp.float32) for _ in range(3))
    left = jnp.array([[1, 30], [5, 2], [0, 9]], jnp.int32)
    run = lambda q, k, v, left: flash_attention(  # noqa: E731
        q, k, v, mask=masks.window(left, 0), implementation=kernel
    )
    for axes, size in (((0, 0, 0, 0), left), ((0, None, 0, 0), left[:, 0]), ((None, 0, None, None), left[0])):
        args = [x if axis == 0 else x[0] for x, axis in zip((q, k, v), axes)]
        got = jax.vmap(run, axes)(*args, size)
        for n in range(3):
            one = [x[n] if axis == 0 else x for x, axis in zip((*args, size), axes)]
            np.testing.assert_allclose(got[n], run(*one), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "static"),
    [
        (lambda x: masks.window(x), {}),
        (lambda x: masks.window(x, 0), {}),
        (lambda x: masks.window(x, 40), {}),
        (lambda x: masks.window(20, 0, x - 30), {}),
        (lambda x: masks.prefix_lm(x) & masks.window(x + 5), {}),
        (lambda x: masks.window(x), {"causal": True}),
    ],
    ids=["left", "causal", "both sides", "offset", "prefix", "the call is causal"],
)
def test_devices_that_split_the_sequence(make, static, kernel):
    """Parts of a call count rows and keys from its own beginning, which the position of each part moves."""
    require_devices(4)
    rng = np.random.default_rng(3)
    mesh = jax.make_mesh((4,), ("s",), axis_types=(AxisType.Auto,))
    q, k, v, tangent = (jnp.asarray(rng.standard_normal((2, 64, 2, 16)), jnp.float32) for _ in range(4))
    left = jnp.array([3, 50], jnp.int32)

    def results(implementation, *arrays):
        def run(q, k, v):
            return flash_attention(q, k, v, mask=make(left), implementation=implementation, **static)

        out, back = jax.vjp(run, *arrays[:3])
        return out, jax.jvp(run, arrays[:3], (arrays[3],) * 3)[1], back(arrays[3])

    sharded = [jax.device_put(x, NamedSharding(mesh, P(None, "s"))) for x in (q, k, v, tangent)]
    got = jax.jit(partial(results, kernel))(*sharded)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), got, results("xla", q, k, v, tangent)
    )


def test_devices_that_split_packed_tokens(kernel):
    require_devices(4)
    rng = np.random.default_rng(4)
    mesh = jax.make_mesh((4,), ("s",), axis_types=(AxisType.Auto,))
    arrays = [jnp.asarray(rng.standard_normal((64, 2, 16)), jnp.float32) for _ in range(3)]
    starts = jnp.array([0, 9, 50, 64], jnp.int32)
    sharded = [jax.device_put(x, NamedSharding(mesh, P("s"))) for x in arrays]

    def run(implementation, left, *arrays):
        mask = masks.window(left)
        return flash_attention_varlen(*arrays, starts, mask=mask, implementation=implementation)

    for left in (jnp.int32(5), jnp.array([2, 30, 0], jnp.int32)):
        got = jax.jit(partial(run, kernel))(left, *sharded)
        np.testing.assert_allclose(got, run("xla", left, *arrays), rtol=2e-5, atol=2e-5)


def test_packed_windows_count_from_each_sequences_rows(implementation):
    checks.require(implementation, dtype="float32")
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.standard_normal((37, 2, 16)), jnp.float32) for _ in range(3))
    left, starts = np.array([2, 50, 0]), np.array([0, 9, 30, 37])
    mask = masks.window(jnp.asarray(left, jnp.int32), 0)
    got = flash_attention_varlen(q, k, v, jnp.asarray(starts), mask=mask, implementation=implementation)
    for n, (begin, end) in enumerate(pairwise(starts)):
        one = [x[None, begin:end] for x in (q, k, v)]
        wanted = flash_attention(*one, causal=True, window=(int(left[n]), None), implementation="xla")[0]
        np.testing.assert_allclose(got[begin:end], wanted, rtol=1e-5, atol=1e-5)
