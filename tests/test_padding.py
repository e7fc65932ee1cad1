"""What lies past a length or outside every sequence is never read: NaN and inf there change no bit of the results.

Each case runs twice, with zeros and with poison there, in every operand and in the cotangents.
"""

import checks
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, make_inputs, varlen
from conftest import IMPLEMENTATION

POISON = {"NaN": np.nan, "inf": np.inf, "−inf": -np.inf}

FIXED = [
    Case("lengths", q_lengths=(12, 5), kv_lengths=(7, 12)),
    Case("nothing in use", q_lengths=(0, 5), kv_lengths=(12, 0)),
    Case("garbage lengths", q_lengths=(-7, 11), kv_lengths=(3, -1)),
    Case("causal", q_lengths=(9, 5), kv_lengths=(4, 11), causal=True, sinks="token"),
    Case("window", q_lengths=(9, 12), kv_lengths=(4, 9), window=(2, 1), align="top_left", softcap=3.0),
    Case("bias", q_lengths=(9, 5), kv_lengths=(4, 11), bias=(2, 4, 12, 12), alibi_slopes=(4,)),
    Case("dropout", q_lengths=(9, 5), kv_lengths=(4, 11), dropout_rate=0.3, mask=(2, 4, 12, 12), segments=2),
    Case("tiles", sq=150, sk=200, q_lengths=(129, 63), kv_lengths=(65, 127), causal=True, bias=(4, 150, 200)),
    Case(
        "odd head dims", sq=70, sk=70, d=7, dv=33, q_lengths=(65, 3), kv_lengths=(1, 66), bias=(2, 1, 1, 70)
    ),
]
VARLEN = [
    varlen("padding after the last", (5, 6), padding=(4, 2)),
    varlen("padding of keys alone", (5, 6), padding=(0, 9), causal=True),
    varlen("only padding", (0, 0), padding=(4, 5), sinks=True),
    varlen("kv_lengths", (5, 9, 1), kv_lengths=(3, 0, 9), padding=(1, 3), causal=True, sinks="token"),
    varlen(
        "kv_lengths, window", (5, 9), kv_lengths=(3, 5), window=(3, 0), align="top_left", alibi_slopes=(4,)
    ),
    varlen("tiles", (70, 65), k_sequences=(129, 70), kv_lengths=(65, 1), padding=(130, 40), dropout_rate=0.2),
]


def unused(case, inputs):
    """The query tokens and the key tokens that nobody reads: [b, s], or packed [t]."""
    if case.layout == "fixed":
        q = np.arange(case.sq) >= np.array(case.q_lengths)[:, None]
        return q, np.arange(case.sk) >= np.array(case.kv_lengths)[:, None]
    q = np.arange(inputs.positional["query"].shape[0]) >= sum(case.q_sequences)
    k = np.ones(inputs.positional["key"].shape[0], bool)
    k_sequences = case.q_sequences if case.k_sequences is None else case.k_sequences
    starts = np.cumsum([0, *k_sequences])
    for start, size, used in zip(starts, k_sequences, case.kv_lengths or k_sequences, strict=False):
        k[start : start + max(0, min(size, used))] = False
    return q, k


def fill(case, inputs, value):
    """The inputs with `value` in all elements that the contract says are never read."""
    q, k = unused(case, inputs)

    def put(x, where):
        return jnp.where(where, jnp.asarray(value, x.dtype), x)

    arrays = {name: put(inputs.positional[name], where[..., None, None]) for name, where in
              (("query", q), ("key", k), ("value", k))}  # fmt: skip
    arrays["dout"] = put(inputs.dout, q[..., None, None])
    arrays["dlse"] = put(inputs.dlse, q[:, None] if case.layout == "fixed" else q)
    if "bias" in inputs.keywords:
        bias = inputs.keywords["bias"]
        hidden = q[:, None, :, None] | k[:, None, None, :]
        # An element of a broadcast bias is unused if all scores that it is added to are unused.
        for axis in range(4):
            if axis < 4 - bias.ndim or bias.shape[axis - 4] == 1:
                hidden = hidden.all(axis, keepdims=True)
        arrays["bias"] = put(bias, hidden.reshape(hidden.shape[4 - bias.ndim :]))
    return checks.with_arrays(inputs, **arrays)


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("case", FIXED + VARLEN, ids=lambda case: case.name)
def test_poison_where_nothing_is_read_changes_not_one_bit(case, poison):
    case = case.replace(dtype=checks.usual_dtype(IMPLEMENTATION))
    inputs = make_inputs(case)
    for deterministic in (False, True) if IMPLEMENTATION == "cuda" else (False,):
        clean, poisoned = (
            checks.run(case, fill(case, inputs, value), IMPLEMENTATION, deterministic=deterministic)
            for value in (0, POISON[poison])
        )
        assert_constants_where_unused(case, inputs, poisoned)
        if IMPLEMENTATION == "cuda" and not deterministic:  # dquery is added up in any order
            clean.gradients.pop("query", None), poisoned.gradients.pop("query", None)
        checks.assert_same(poisoned, clean)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", [FIXED[3], FIXED[7], VARLEN[3], VARLEN[5]], ids=lambda case: case.name)
def test_the_same_in_16_bit(case, dtype):
    case = case.replace(dtype=dtype)
    inputs = make_inputs(case)
    clean = checks.run(case, fill(case, inputs, 0), IMPLEMENTATION)
    checks.assert_same(checks.run(case, fill(case, inputs, np.nan), IMPLEMENTATION), clean)


by_deterministic = pytest.mark.parametrize("deterministic", [False, True])
by_dtype = pytest.mark.parametrize("dtype", ["bfloat16", "float32"])


def by_sizes(*sizes):  # (batch, heads, tokens)
    return pytest.mark.parametrize("sizes", sizes, ids=lambda each: "x".join(map(str, each)))


# On CUDA: dQ from one or two key tiles, with sums in memory, and with kept sums.
@by_deterministic
@by_dtype
@by_sizes((2, 4, 40), (2, 4, 70), (2, 4, 140), (66, 8, 140))
def test_rows_past_a_length_have_no_gradient_whatever_values_the_others_see(sizes, dtype, deterministic):
    batch, heads, size = sizes
    lengths = {"q_lengths": (size - 5, 3) * (batch // 2), "kv_lengths": (size,) * batch}
    case = Case("lengths", b=batch, hq=heads, hk=heads, sq=size, sk=size, dtype=dtype, **lengths)
    inputs = make_inputs(case)
    value = inputs.positional["value"].at[:, 5].set(np.inf)
    got = checks.run(
        case, checks.with_arrays(inputs, value=value), IMPLEMENTATION, deterministic=deterministic
    )
    rows, _ = unused(case, inputs)
    dquery = got.gradients["query"].astype(np.float32)
    assert (dquery[rows] == 0).all()
    assert not np.isfinite(dquery[~rows]).any()


@by_deterministic
@by_dtype
@by_sizes((2, 4, 40), (2, 4, 140))
@pytest.mark.parametrize("head_dim", [16, 256])
@pytest.mark.parametrize("infinite", ["query", "dout"])
def test_keys_past_a_length_have_no_gradient_whatever_rows_see_the_others(
    infinite, head_dim, sizes, dtype, deterministic
):
    batch, heads, size = sizes
    lengths = {"q_lengths": (size,) * batch, "kv_lengths": (size - 5, 3) * (batch // 2)}
    case = Case("lengths", b=batch, hq=heads, hk=heads, sq=size, sk=size, d=head_dim, dv=head_dim, dtype=dtype,
                **lengths)  # fmt: skip
    inputs = make_inputs(case)
    array = inputs.dout if infinite == "dout" else inputs.positional["query"]
    inputs = checks.with_arrays(inputs, **{infinite: array.at[:, 2].set(np.inf)})
    got = checks.run(case, inputs, IMPLEMENTATION, deterministic=deterministic)
    _, keys = unused(case, inputs)
    for name in ("key", "value"):
        gradient = got.gradients[name].astype(np.float32)
        assert (gradient[keys] == 0).all(), name
        assert not np.isfinite(gradient[~keys]).all(), name


@by_dtype
@pytest.mark.parametrize("size", [40, 140])
@pytest.mark.parametrize("infinite", ["query", "value", "dout"])
def test_scores_past_a_length_have_no_gradient_of_bias(infinite, size, dtype):
    case = Case("lengths", hq=2, hk=2, sq=size, sk=size, q_lengths=(size - 5, 3), kv_lengths=(size - 7, 20),
                bias=(2, 2, size, size), dtype=dtype)  # fmt: skip
    inputs = make_inputs(case)
    array = inputs.dout if infinite == "dout" else inputs.positional[infinite]
    inputs = checks.with_arrays(inputs, **{infinite: array.at[:, 2].set(np.inf)})
    rows, keys = unused(case, inputs)
    hidden = rows[:, None, :, None] | keys[:, None, None, :] | np.zeros((1, 2, 1, 1), bool)
    dbias = checks.run(case, inputs, IMPLEMENTATION).gradients["bias"].astype(np.float32)
    assert (dbias[hidden] == 0).all()
    assert not np.isfinite(dbias[~hidden]).all()


# In 16 bits a kernel chooses its tanh by the largest score that a warp holds.
CAPPED = [
    Case("alone", sq=70, sk=150, d=64, dv=64, q_lengths=(65, 3), kv_lengths=(149, 66), softcap=20.0),
    Case(
        "with alibi", sq=70, sk=150, q_lengths=(65, 3), kv_lengths=(149, 66), softcap=20.0, alibi_slopes=(4,)
    ),
    varlen("packed", (70, 65), k_sequences=(129, 70), kv_lengths=(65, 1), padding=(30, 40), softcap=20.0),
]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e3])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", CAPPED, ids=lambda case: case.name)
def test_what_is_not_read_does_not_choose_how_scores_are_capped(case, dtype, value):
    case = case.replace(dtype=dtype)
    inputs = make_inputs(case)
    clean = checks.run(case, fill(case, inputs, 0), IMPLEMENTATION, deterministic=True)
    checks.assert_same(checks.run(case, fill(case, inputs, value), IMPLEMENTATION, deterministic=True), clean)


@pytest.mark.parametrize("case", [*FIXED[:6], *VARLEN[:5]], ids=lambda case: case.name)
def test_the_same_in_plain_jax(case):
    inputs = make_inputs(case)
    clean = checks.run(case, fill(case, inputs, 0), "xla")
    poisoned = checks.run(case, fill(case, inputs, np.nan), "xla")
    checks.assert_same(poisoned, clean)
    assert_constants_where_unused(case, inputs, poisoned)


def assert_constants_where_unused(case, inputs, got):
    """Unused rows have out 0 and lse −inf, and all gradients of unused elements are 0."""
    q, k = unused(case, inputs)
    assert (got.out[q] == 0).all()
    rows = np.swapaxes(got.lse, -1, -2)  # [b, sq, hq] or [tq, hq]
    assert np.isneginf(rows[q]).all()
    for name, where in (("query", q), ("key", k), ("value", k)):
        if name in got.gradients:
            assert (got.gradients[name][where] == 0).all(), name
    for name, gradient in got.gradients.items():
        assert np.isfinite(gradient.astype(np.float32)).all(), name


MASKED = [
    Case("mask", mask=(1, 1, 12, 1)),
    Case("causal", sq=20, sk=5, causal=True),
    Case("window", sq=21, sk=9, window=(2, 0), align="top_left"),
    Case("no keys", kv_lengths=(0, 5)),
    Case("segments", segments=7, sk=6),
]


@pytest.mark.parametrize("case", MASKED, ids=lambda case: case.name)
def test_fully_masked_rows_are_zero_whatever_their_cotangents(case, implementation):
    case = case.replace(dtype=checks.usual_dtype(implementation))
    inputs = make_inputs(case)
    plain = checks.run(case, inputs, implementation)
    nothing = np.isneginf(plain.lse)  # [b, hq, sq]
    assert nothing.any()
    assert not nothing.all()
    assert (np.swapaxes(plain.out, 1, 2)[nothing] == 0).all()
    if "query" not in plain.gradients:
        return
    poisoned = checks.with_arrays(
        inputs,
        dlse=jnp.where(nothing, np.nan, inputs.dlse),
        dout=jnp.where(np.swapaxes(nothing, 1, 2)[..., None], np.nan, inputs.dout),
    )
    got = checks.run(case, poisoned, implementation)
    checks.assert_same(got, plain)
    assert (np.swapaxes(got.gradients["query"], 1, 2)[nothing] == 0).all()


def test_rows_without_keys_give_the_sink_its_share(implementation):
    """With sinks such a row has lse = sink, so that merging parts gives the whole, and o = 0."""
    checks.require(implementation, dtype="bfloat16")
    case = Case("sinks", sinks=True, kv_lengths=(0, 5), dtype="bfloat16")
    got = checks.run(case, make_inputs(case), implementation)
    sinks = np.asarray(make_inputs(case).keywords["sinks"])
    np.testing.assert_allclose(got.lse[0], np.broadcast_to(sinks[:, None], (4, 12)), rtol=1e-6)
    assert (got.out[0] == 0).all()
