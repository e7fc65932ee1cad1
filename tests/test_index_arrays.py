"""Whatever values index arrays hold on the device, the call equals the one with clamped values.

cu_seqlens is read as its running maximum clamped to [0, t], and lengths are clamped to the operand. The last tests say
which arrays are accepted as indices.
"""

import functools
import re

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, make_inputs, varlen
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshes import place, qkv
from programs import assert_same, attention, require_devices, with_gradients

from jax_flash import (
    append_kv,
    apply_rotary,
    dot_product_attention,
    flash_attention,
    flash_attention_varlen,
    paged_attention,
)

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
T, N = 20, 4  # tokens and sequences of every packed case

CU_SEQLENS = {
    "decreasing": [20, 15, 10, 5, 0],
    "zigzag": [0, 12, 4, 18, 9],
    "negative": [-5, -1, 3, -9, 20],
    "all negative": [-5, -4, -3, -2, -1],
    "past the end": [0, 7, 25, 1000, 21],
    "first offset not zero": [6, 8, 8, 15, 17],
    "INT_MIN": [INT_MIN, INT_MIN, 5, INT_MIN, 12],
    "INT_MAX": [0, INT_MAX, INT_MIN, INT_MAX, 3],
    "INT_MAX at once": [INT_MAX] * 5,
    "one token far past the end": [0, 5, 2**30, 2**30 + 1, 20],
    "unused ones are 0": [0, 1, 3, 0, 0],
    "unused ones are -1": [0, 15, 16, -1, -1],
    "a rise after a fall": [0, 7, 5, 6, 20],
    "bits": [0x7FC00000, -1, 0x0BADF00D, 0x3F800000, 2],
}
LENGTHS = {
    "negative": [-1, -7, 3, -100],
    "huge": [13, 1000, 12, 2**30],
    "INT_MIN": [INT_MIN, 5, INT_MIN, 0],
    "INT_MAX": [INT_MAX, 0, INT_MAX, 1],
}


def i32(values):
    return jnp.asarray(np.asarray(values, np.int64).astype(np.int32))


def clamped(cu_seqlens, tokens=T):
    return np.maximum.accumulate(np.clip(cu_seqlens, 0, tokens))


def assert_equal_to_clamped(case, implementation, garbage, sane):
    """The same bits from both, forward and backward."""
    case = case.replace(dtype=checks.usual_dtype(implementation))
    inputs = make_inputs(case)
    got, wanted = (
        checks.run(
            case,
            checks.with_arrays(inputs, **{name: i32(x) for name, x in arrays.items()}),
            implementation,
            at_once=False,  # all of these share their shapes
        )
        for arrays in (garbage, sane)
    )
    checks.assert_same(got, wanted)
    assert np.isfinite(got.out).all()
    assert not np.isnan(got.lse).any()


PACKED = varlen("packed", (5, 5, 5, 5), causal=True, window=(6, None), alibi_slopes=(4, 4), dropout_rate=0.2)


@pytest.mark.parametrize("name", CU_SEQLENS)
def test_cu_seqlens_are_read_as_their_running_maximum_within_the_operand(name, implementation):
    garbage = CU_SEQLENS[name]
    for other in ([0, 3, 3, 11, 20], garbage):
        assert_equal_to_clamped(
            PACKED,
            implementation,
            {"cu_seqlens_q": garbage, "cu_seqlens_k": other},
            {"cu_seqlens_q": clamped(garbage), "cu_seqlens_k": clamped(other)},
        )


@functools.cache
def over_pages(implementation, d, lanes):
    """A call of packed queries over pages, as a function of cu_seqlens_q; with `lanes`, of one array for each lane."""
    rng, dtype = np.random.default_rng(0), checks.usual_dtype(implementation)
    q, k, v = (jnp.asarray(rng.standard_normal(x), dtype) for x in ((T, 4, d), (12, 4, 2, d), (12, 4, 2, d)))
    tables, lengths = jnp.arange(12, dtype=jnp.int32).reshape(N, 3), i32([12, 7, 9, 3])

    def call(cu_seqlens):
        return paged_attention(
            q, k, v, tables, lengths, cu_seqlens_q=cu_seqlens, causal=True, return_lse=True,
            implementation=implementation,
        )  # fmt: skip

    return jax.jit(jax.vmap(call) if lanes else call)


@pytest.mark.parametrize("d", [16, 64])
@pytest.mark.parametrize("name", CU_SEQLENS)
def test_cu_seqlens_of_queries_over_pages(name, d, kernel):
    """On CUDA, decode runs short sequences, on sm_90 at d64 in clusters, but only if the array is in order. So results
    equal within rounding."""
    tolerance = 1e-5 if checks.usual_dtype(kernel) == "float32" else 2e-2
    garbage, sane = CU_SEQLENS[name], clamped(CU_SEQLENS[name])
    call = over_pages(kernel, d, lanes=False)
    assert_same(call(i32(garbage)), call(i32(sane)), tolerance=tolerance)
    call = over_pages(kernel, d, lanes=True)
    assert_same(
        call(i32([[0, 1, 3, 18, 20], garbage])), call(i32([[0, 1, 3, 18, 20], sane])), tolerance=tolerance
    )


@pytest.mark.parametrize("name", ["zigzag", "negative", "INT_MAX", "bits"])
def test_garbage_in_cu_seqlens_k_alone(name, implementation):
    assert_equal_to_clamped(
        PACKED,
        implementation,
        {"cu_seqlens_k": CU_SEQLENS[name]},
        {"cu_seqlens_k": clamped(CU_SEQLENS[name])},
    )


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_of_a_batch_are_clamped_to_the_operand(name, implementation):
    garbage = LENGTHS[name]
    case = Case("lengths", b=4, sk=13, q_lengths=(1,) * 4, kv_lengths=(1,) * 4, causal=True)
    q, k = np.clip(garbage, 0, 12), np.clip(garbage, 0, 13)
    for lengths, sane in (
        ({"q_lengths": garbage}, {"q_lengths": q}),
        ({"kv_lengths": garbage[::-1]}, {"kv_lengths": k[::-1]}),
        ({"q_lengths": garbage, "kv_lengths": garbage}, {"q_lengths": q, "kv_lengths": k}),
    ):
        assert_equal_to_clamped(case, implementation, lengths, sane)


@pytest.mark.parametrize("name", LENGTHS)
def test_kv_lengths_of_packed_sequences_are_clamped_to_each_sequence(name, implementation):
    case = PACKED.replace(kv_lengths=(5,) * 4)
    cu = CU_SEQLENS["zigzag"]
    sane = np.clip(LENGTHS[name], 0, np.diff(clamped(cu)))
    assert_equal_to_clamped(
        case,
        implementation,
        {"kv_lengths": LENGTHS[name], "cu_seqlens_k": cu},
        {"kv_lengths": sane, "cu_seqlens_k": clamped(cu)},
    )


def test_garbage_equals_the_equations(implementation):
    """The results equal the oracle's, which reads garbage as the contract says."""
    case = varlen("oracle", (5, 5, 5, 5), causal=True, sinks=True, kv_lengths=(99, -3, 2, INT_MAX))
    case = case.replace(dtype=checks.usual_dtype(implementation))
    checks.check(case, implementation)
    case = Case("oracle", q_lengths=(INT_MIN, INT_MAX), kv_lengths=(INT_MAX, 7), causal=True)
    checks.check(case.replace(dtype=checks.usual_dtype(implementation)), implementation)


def test_segment_ids_are_compared_whatever_they_hold(implementation):
    case = Case("segments", segments=2, dtype=checks.usual_dtype(implementation))
    inputs = make_inputs(case)
    values = np.array([INT_MIN, INT_MAX], np.int32)
    wild = tuple(jnp.asarray(values[np.asarray(ids)]) for ids in inputs.keywords["segment_ids"])
    got = checks.run(case, checks.with_arrays(inputs, segment_ids=wild), implementation)
    checks.assert_same(got, checks.run(case, inputs, implementation))


# A sequence that is split over devices, each of which reads the arrays for itself.


def assert_split_equals_clamped(case, implementation, spec, garbage, sane):
    """Four devices give for garbage what one device gives for the clamped values."""
    run, arrays = split_run(case, implementation)
    mesh = make_mesh(4)
    placed = place(mesh, arrays | {name: i32(x) for name, x in garbage.items()}, qkv(spec))
    wanted = run(arrays | {name: i32(x) for name, x in sane.items()})
    assert_same(run(placed), wanted, tolerance=2e-2 if case.dtype != "float32" else 1e-5)


@functools.cache
def split_run(case, implementation):
    inputs = make_inputs(case)
    arrays, call = inputs.positional | inputs.keywords, attention(case, implementation)
    if not case.causal or case.layout == "fixed":
        return jax.jit(with_gradients(call)), arrays
    del arrays["cu_seqlens_k"]  # one array for queries and keys; otherwise tokens with a band are gathered
    return jax.jit(with_gradients(lambda arrays: call(arrays | {"cu_seqlens_k": None}))), arrays


@functools.cache
def make_mesh(devices):
    require_devices(devices)
    return jax.make_mesh((devices,), ("x",), (AxisType.Auto,), devices=jax.devices()[:devices])


SPLIT_PACKED = {
    "a band": varlen("split", (5, 5, 5, 5), causal=True),
    "lengths": varlen("split", (5, 5, 5, 5), kv_lengths=(5,) * 4),
}


@pytest.mark.parametrize("kind", SPLIT_PACKED)
@pytest.mark.parametrize("name", CU_SEQLENS)
def test_cu_seqlens_of_tokens_that_are_split(name, kind, kernel):
    case = SPLIT_PACKED[kind].replace(dtype=checks.usual_dtype(kernel))
    garbage, sane = CU_SEQLENS[name], clamped(CU_SEQLENS[name])
    lengths = {"kv_lengths": (3, 2, INT_MIN, INT_MAX)} if kind == "lengths" else {}
    clipped = {n: np.clip(x, 0, np.diff(sane)) for n, x in lengths.items()}
    names = ("cu_seqlens_q",) if case.causal else ("cu_seqlens_q", "cu_seqlens_k")
    assert_split_equals_clamped(
        case, kernel, P("x"), dict.fromkeys(names, garbage) | lengths, dict.fromkeys(names, sane) | clipped
    )


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_of_sequences_that_are_split(name, kernel):
    """Clamped lengths move the diagonal: the last query's diagonal is at the last key in use."""
    case = Case("split", b=4, sk=16, q_lengths=(1,) * 4, kv_lengths=(1,) * 4, causal=True)
    garbage = {"q_lengths": LENGTHS[name], "kv_lengths": LENGTHS[name][::-1]}
    sane = {n: np.clip(x, 0, size) for (n, x), size in zip(garbage.items(), (12, 16))}
    case = case.replace(dtype=checks.usual_dtype(kernel))
    assert_split_equals_clamped(case, kernel, P(None, "x"), garbage, sane)


# Which arrays are taken: int32 from JAX, and integers of any type on the host.

X, PACKED_X = jnp.ones((2, 4, 2, 8)), jnp.ones((9, 2, 8))
POOL, ANGLES = jnp.ones((6, 2, 2, 8)), jnp.ones((9, 2))
OFFSETS, TABLES, LENGTHS_OF_TWO = [0, 4, 9], [[0, 1], [2, 3]], [3, 1]
CALLS = {  # a call, and its index arrays
    "fixed": (
        lambda **index: flash_attention(X, X, X, **index),
        {"q_lengths": LENGTHS_OF_TWO, "kv_lengths": LENGTHS_OF_TWO},
    ),
    "packed": (
        lambda **index: flash_attention_varlen(PACKED_X, PACKED_X, PACKED_X, **index),
        {"cu_seqlens_q": OFFSETS, "cu_seqlens_k": OFFSETS, "kv_lengths": LENGTHS_OF_TWO},
    ),
    "paged": (
        lambda **index: paged_attention(PACKED_X, POOL, POOL, **index),
        {"block_tables": TABLES, "kv_lengths": LENGTHS_OF_TWO, "cu_seqlens_q": OFFSETS},
    ),
    "append": (
        lambda **index: append_kv(POOL, POOL, 2 * PACKED_X, PACKED_X, **index),
        {"block_tables": TABLES, "kv_lengths": LENGTHS_OF_TWO, "cu_seqlens": OFFSETS},
    ),
    "rotary": (
        lambda positions: apply_rotary(X, positions, ANGLES, ANGLES),
        {"positions": [3, 1, 2, 8]},
    ),
    "jax.nn's": (
        lambda **index: dot_product_attention(X, X, X, **index),
        {"query_seq_lengths": LENGTHS_OF_TWO, "key_value_seq_lengths": LENGTHS_OF_TWO},
    ),
}
HOST = {
    "lists": list,
    "tuples": lambda x: tuple(map(tuple, x)) if isinstance(x[0], list) else tuple(x),
    "int64, as of np.cumsum": lambda x: np.array(x, np.int64),
    "uint8": lambda x: np.array(x, np.uint8),
    "lists with an array of JAX": lambda x: [*x[:-1], jnp.asarray(x[-1], jnp.int32)],
}
every_call = pytest.mark.parametrize("name", CALLS)


@every_call
@pytest.mark.parametrize("made", HOST)
@pytest.mark.parametrize("x64", [False, True])
def test_integers_on_the_host_are_taken_whatever_their_type(name, made, x64):
    call, index = CALLS[name]
    wanted = call(**{argument: i32(x) for argument, x in index.items()})
    with jax.enable_x64(x64):
        got = call(**{argument: HOST[made](x) for argument, x in index.items()})
        jax.tree.map(np.testing.assert_array_equal, got, wanted)


@pytest.mark.parametrize("made", [list, lambda x: np.array(x, np.int64)], ids=["list", "int64"])
def test_the_lowest_and_the_highest_int32_on_the_host_are_taken(made):
    got = flash_attention(X, X, X, kv_lengths=made([INT_MIN, INT_MAX]))
    np.testing.assert_array_equal(got, flash_attention(X, X, X, kv_lengths=i32([0, 4])))


WRONG = {  # made of the right numbers, exception, sentence
    "floats of NumPy": (lambda x: np.array(x, np.float64), TypeError, "must hold integers, got float64"),
    "booleans of NumPy": (lambda x: np.array(x, bool), TypeError, "must hold integers, got bool"),
    "a list of floats": (lambda x: np.array(x, float).tolist(), TypeError, "must hold integers, got float64"),
    "a list of booleans": (lambda x: np.array(x, bool).tolist(), TypeError, "must hold integers, got bool"),
    "floats of JAX": (lambda x: jnp.array(x, jnp.float32), TypeError, "must be int32, got float32; cast it with"),
    "booleans of JAX": (lambda x: jnp.array(x, bool), TypeError, "must be int32, got bool; cast it with"),
    "int8 of JAX": (lambda x: jnp.array(x, jnp.int8), TypeError, "must be int32, got int8; cast it with"),
    "a string": (str, TypeError, "must be an array, got '"),
    "too large": (
        lambda x: np.array(x, np.int64) + 2**31,
        ValueError,
        "allowed are the values of int32, at most 2147483647",
    ),
    "too small": (lambda x: np.array(x, np.int64) - 2**32, ValueError, "allowed are the values of int32"),
}  # fmt: skip


@every_call
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_integer_or_does_not_fit_is_refused_instead_of_rounded(name, wrong):
    call, index = CALLS[name]
    made, error, message = WRONG[wrong]
    for argument, x in index.items():
        with pytest.raises(error, match=rf": {argument} .*{re.escape(message)}"):
            call(**index | {argument: made(x)})


@every_call
def test_int64_arrays_of_jax_are_refused_traced_or_not(name):
    call, index = CALLS[name]
    with jax.enable_x64(True):
        for argument, x in index.items():
            wide = jnp.array(x, jnp.int64)
            for run in (call, lambda **index: jax.jit(lambda index: call(**index))(index)):
                with pytest.raises(TypeError, match=f": {argument} must be int32, got int64; cast it with"):
                    run(**{name: i32(y) for name, y in index.items()} | {argument: wide})


@pytest.mark.parametrize("ids", ["int64", "uint8"])
def test_segment_ids_on_the_host_are_taken_too(ids):
    segments = np.array([[0, 0, 1, 1], [0, 1, 1, 2]])
    wanted = flash_attention(X, X, X, segment_ids=i32(segments))
    np.testing.assert_array_equal(flash_attention(X, X, X, segment_ids=segments.astype(ids)), wanted)
    pair = segments.tolist(), segments.astype(ids)
    np.testing.assert_array_equal(flash_attention(X, X, X, segment_ids=pair), wanted)
    with pytest.raises(TypeError, match="segment_ids must hold integers, got float64"):
        flash_attention(X, X, X, segment_ids=segments / 2)


# One number for all sequences.


@pytest.mark.parametrize("name", ["fixed", "packed", "paged", "append"])
def test_one_number_is_the_length_of_all(name):
    call, index = CALLS[name]
    for argument in set(index) & {"q_lengths", "kv_lengths"}:
        wanted = call(**index | {argument: [2, 2]})
        for number in (2, np.int64(2), np.array(2, np.uint8), jnp.int32(2)):
            got = call(**index | {argument: number})
            jax.tree.map(np.testing.assert_array_equal, got, wanted)
        traced = jax.jit(lambda n, argument=argument: call(**index | {argument: n}))(jnp.int32(2))
        jax.tree.map(np.testing.assert_array_equal, traced, wanted)
        mapped = jax.vmap(lambda n, argument=argument: call(**index | {argument: n}))(i32([2, 1]))
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[0], y), mapped, wanted)
        for wrong, got in ((True, "bool"), (2.0, "float64")):
            with pytest.raises(TypeError, match=f"{argument} must hold integers, got {got}"):
                call(**index | {argument: wrong})
