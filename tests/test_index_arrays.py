"""Index values that only the device sees: whatever they hold, the call equals the one with the clamped values.

cu_seqlens is read as its running maximum clamped to [0, t], lengths are clamped to the operand.
"""

import checks
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, make_inputs, varlen

from jax_flash import flash_attention, flash_attention_varlen

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
            case, checks.with_arrays(inputs, **{name: i32(x) for name, x in arrays.items()}), implementation
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


def test_garbage_equals_the_row_by_row_equations(implementation):
    """Not only self-consistent: the oracle reads garbage as the contract says."""
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


WRONG = [
    *(
        (name, dtype)
        for name in ("cu_seqlens_q", "cu_seqlens_k", "kv_lengths")
        for dtype in ("int64", "float32")
    ),
    ("cu_seqlens_q", "uint32"),
    ("cu_seqlens_q", "int16"),
]


@pytest.mark.parametrize(("name", "dtype"), WRONG)
def test_packed_index_arrays_of_another_dtype_are_refused(name, dtype, implementation):
    x = jnp.zeros((4, 2, 8))
    index = {"cu_seqlens_q": i32([0, 4]), "cu_seqlens_k": i32([0, 4]), "kv_lengths": i32([4])}
    index[name] = np.asarray(index[name]).astype(dtype)
    message = f"flash_attention_varlen: {name} must be int32, got {dtype}; cast it with .astype\\('int32'\\)"
    with pytest.raises(TypeError, match=message):
        flash_attention_varlen(x, x, x, **index, implementation=implementation)


@pytest.mark.parametrize("name", ["q_lengths", "kv_lengths", "segment_ids"])
@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool"])
def test_fixed_index_arrays_of_another_dtype_are_refused(name, dtype, implementation):
    x = jnp.zeros((2, 4, 2, 8))
    index = {name: np.zeros((2, 4) if name == "segment_ids" else 2, dtype)}
    with pytest.raises(TypeError, match=f"flash_attention: {name} must be int32, got {dtype}"):
        flash_attention(x, x, x, **index, implementation=implementation)
