"""CUDA kernels over several tiles of queries and keys, at every head dim and with each option, NaN where nobody reads.

They run on a GPU, or on the emulator (`make cuda-emulate`), where sizes are smaller and each case has one dtype.
The CPU kernels have tests of their own (test_cpu_forward.py, test_cpu_backward.py).
"""

import sys
from functools import partial

import checks
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES, DTYPES, Case, make_inputs, varlen
from conftest import IMPLEMENTATION
from plans import HEAD_DIMS

from jax_flash import flash_attention

EMULATED = "emulated" in sys.modules  # the pytest plugin of tests/kernels/emulator
if not EMULATED and IMPLEMENTATION != "cuda":
    pytest.skip("neither a GPU's kernels nor emulated ones are tested", allow_module_level=True)

HALF = ("bfloat16", "float16")
PADDED_HEAD_DIMS = ((8, 8), (40, 40), (64, 24), (72, 128), (160, 112), (224, 224), (320, 488))
SQ, SK = (150, 170) if EMULATED else (300, 1104)
SIZES = {"b": 1, "hq": 2, "hk": 1, "sq": SQ, "sk": SK}
SCORES_EMULATED = 300_000  # the largest number of scores of an emulated case

general = {"softcap": 5.0, "bias": (1, 2, SQ, SK), "dropout_rate": 0.2, "window": (200, 50)}
EVERY_HEAD_DIM = [
    Case(f"{name} d{d}/{dv}", d=d, dv=dv, **options, **SIZES)
    for d, dv in (*HEAD_DIMS, *PADDED_HEAD_DIMS)
    for name, options in (("causal", {"causal": True}), ("general", general))
    if options is not general or not EMULATED
]

# Each option alone has kernels of its own on Hopper, which read a bias in the query's dtype or in float32.
OPTIONS = {
    "alibi": {"alibi_slopes": (2,)},
    "segments": {"segments": 3},
    "softcap of small scores": {"softcap": 20.0},
    "softcap": {"softcap": 7.0},
    "softcap of large scores": {"softcap": 50.0, "scale": 5.0},
    "dropout": {"dropout_rate": 0.3},
    "more dropout": {"dropout_rate": 0.7},
    "bias": {"bias": (2, 1, SQ, SK)},
    "bias of heads": {"bias": (1, 2, SQ, SK)},
    "bias of keys": {"bias": (2, 1, 1, SK)},
}
SHORTER = {"q_lengths": (SQ - 7, 64), "kv_lengths": (SK - 20, 130), "causal": True}
ONE_OPTION = [
    Case(f"{name}{also} d{d}/{dv}", d=d, dv=dv, **options, **SIZES | {"b": 2}, **band)
    for d, dv in HEAD_DIMS
    for name, options in OPTIONS.items()
    for also, band in (("", {"window": (300, 400)}), (", causal, shorter", SHORTER))
    if not band.get("causal") or d in (64, 128, 256)
]

SIZES_64 = SIZES | {"d": 64, "dv": 64}
PACKED = {"hq": 4, "hk": 2, "d": 64, "dv": 64, "causal": True}
OTHER_KEYS = {"k_sequences": (150, 3, 9, 170, 64), "padding": (70, 3)}
EACH_MASK = [
    Case("plain", **SIZES_64),
    Case("window", window=(40, 3), **SIZES_64),
    Case("top left", causal=True, align="top_left", **SIZES_64),
    Case("lengths", causal=True, q_lengths=(SQ - 7,), kv_lengths=(SK - 20,), **SIZES_64),
    Case("mask", mask=(1, 2, SQ, SK), **SIZES_64),
    Case("bias in float16", bias=(1, 1, SQ, SK), bias_dtype="float16", **SIZES_64),
    Case("bias of keys", bias=(1, 2, 1, SK), causal=True, **SIZES_64),
    Case("bias of rows", bias=(1, 1, SQ, 1), bias_dtype="bfloat16", **SIZES_64),
    Case("bias first", bias=(1, 2, SQ, SK), bias_first=True, softcap=2.0, window=(90, None), **SIZES_64),
    Case("bias of rows, first", bias=(1, 2, SQ, 1), bias_first=True, softcap=2.0, causal=True, **SIZES_64),
    Case("segments", segments=5, **SIZES_64),
    Case("alibi", alibi_slopes=(2,), causal=True, **SIZES_64),
    Case("dropout", dropout_rate=0.4, **SIZES_64),
    Case("scale 0", scale=0.0, sinks="token", **SIZES_64),
    Case("negative scale", scale=-0.3, **SIZES_64),
    Case("softcap", softcap=3.0, window=(90, None), **SIZES_64),
    varlen("packed", (130, 1, 0, 200, 64), **OTHER_KEYS, **PACKED),
    varlen("packed, some keys", (130, 1, 0, 200, 64), kv_lengths=(149, 0, 3, 9, 64), **OTHER_KEYS, **PACKED),
    varlen("many sequences", tuple(i % 5 for i in range(60 if EMULATED else 600)), **PACKED),
    varlen("no sequence", (), padding=(140, 20), **PACKED),
]

# On Hopper each half of a tile of 128 keys skips the blocks of 64 rows beyond the edges of its band.
BAND_EDGES = [
    case.replace(name=f"{case.name} d{d}", d=d, dv=d, hq=4, hk=2, sk=case.sk)
    for d in (32, 64, 128)
    for case in (
        *(
            Case(f"window {window}", window=window, **SIZES | {"sq": 330, "sk": 330})
            for window in ((63, 0), (64, 64), (127, 0), (129, 65), (0, 200), (1, 1))
        ),
        Case("causal", causal=True, **SIZES | {"sq": 330, "sk": 330}),
        Case("causal, more keys", causal=True, window=(100, 0), **SIZES | {"sk": SQ + 97}),
        Case(
            "window, lengths",
            q_lengths=(SQ - 7,),
            kv_lengths=(SQ + 35,),
            window=(90, 30),
            **SIZES | {"sk": SQ + 60},
        ),
    )
]

# On Hopper a cluster has all key tiles of a KV head, if they are at most 4 and all clusters run at once.
SHORT = [
    case.replace(name=f"{case.name} d{d}", d=d, dv=d)
    for d in (64, 128)
    for case in (
        Case("two tiles", **SIZES | {"sk": 130}),
        Case("three tiles", causal=True, **SIZES | {"b": 2, "sk": 300, "hq": 6, "hk": 2}),
        Case("four tiles, window", window=(100, 33), **SIZES | {"sk": 500}),
        Case("four tiles", **SIZES | {"sq": 512, "sk": 512, "hq": 16, "hk": 16}),
        Case("eight tiles", **SIZES | {"sq": 1024, "sk": 1024, "hq": 16, "hk": 16}),
        Case("lengths", q_lengths=(SQ - 7, 64), kv_lengths=(300, 130), **SIZES | {"b": 2, "sk": 384}),
        Case("more heads than clusters", causal=True, **SIZES | {"sk": 500, "hq": 66, "hk": 33}),
        Case("groups of heads", causal=True, **SIZES | {"b": 5, "sk": 600, "hq": 12, "hk": 12}),
        varlen("packed groups of heads", (700, 40, 300), hq=48, hk=48, causal=True),
    )
]

# On Hopper two CTAs share a tile of keys in the backward of these head dims.
LARGE_HEAD_DIMS = [
    case.replace(name=f"{case.name} d{d}/{dv}", d=d, dv=dv)
    for d, dv in ((192, 128), (192, 192), (256, 256), (160, 88), (232, 200), (512, 512), (136, 488))
    for case in (
        Case("window", window=(100, 33), **SIZES),
        Case("window, lengths", window=(50, 3), align="top_left", kv_lengths=(97, SK), **SIZES | {"b": 2}),
        Case("top left", causal=True, align="top_left", **SIZES),
        Case(
            "sinks, lengths",
            sinks=True,
            q_lengths=(SQ - 7, 64),
            kv_lengths=(SK - 20, 130),
            # More heads, since the limit for dsinks is the largest error over the heads.
            **SIZES | {"b": 2, "hq": 6},
        ),
        Case("more tiles than clusters", causal=True, **SIZES | {"hq": 20, "hk": 10}),
        Case(
            "more tiles than clusters, lengths",
            causal=True,
            kv_lengths=(SK, 1),
            **SIZES | {"b": 2, "hk": 5, "hq": 5},
        ),
        Case("one query", **SIZES | {"sq": 1}),
        Case("one key", **SIZES | {"sk": 1}),
        varlen("packed", (130, 1, 0, 200, 64), **OTHER_KEYS, **PACKED),
        varlen("packed, window", (130, 1, 0, 200, 64), window=(60, 0), **OTHER_KEYS, **PACKED),
        varlen(
            "packed, some keys", (130, 1, 0, 200, 64), kv_lengths=(149, 0, 3, 9, 64), **OTHER_KEYS, **PACKED
        ),
        varlen(
            "packed, options", (130, 1, 0, 200, 64), dropout_rate=0.2, softcap=5.0, **OTHER_KEYS, **PACKED
        ),
    )
]

# On Hopper one load of these keys serves both products.
VALUES_ARE_KEYS = [
    case.replace(name=f"{case.name} d{d}", d=d, dv=d, shared_kv=True)
    for d in (264, 512)
    for case in (
        Case("causal", causal=True, **SIZES),
        Case("window", window=(100, 33), **SIZES | {"hq": 20, "hk": 10}),
        Case("lengths", q_lengths=(SQ - 7, 64), kv_lengths=(SK - 20, 130), **SIZES | {"b": 2}),
        Case("softcap", softcap=7.0, causal=True, **SIZES),
        varlen("packed", (130, 1, 0, 200, 64), **OTHER_KEYS, **PACKED),
    )
]

# With few tokens these keys are read as latent pools are, once for up to 64 query rows.
TOKEN = SIZES | {"hk": 1, "sq": 1}
FEW_TOKENS = [
    case.replace(name=f"{case.name} d{d}", d=d, dv=d, shared_kv=True)
    for d in ((512,) if EMULATED else (264, 512))
    for case in (
        Case("one token", kv_lengths=(SK - 20, 130), sinks=True, **TOKEN | {"b": 2, "hq": 128}),
        Case("few rows", window=(100, 33), **TOKEN | {"sq": 2, "hq": 16, "hk": 2}),
        Case(
            "rows of several tiles", causal=True, q_lengths=(5, 0, 2), **TOKEN | {"b": 3, "sq": 5, "hq": 40}
        ),
        Case("options", softcap=7.0, alibi_slopes=(20,), causal=True, **TOKEN | {"sq": 9, "hq": 20}),
        Case("ranges", forms=("spans", "window"), **TOKEN | {"b": 2, "sq": 3, "hq": 20}),
    )
]

# On Hopper query tiles hold all query heads of a KV head, if decode would read keys more than once.
PACKED_HEADS = [
    case.replace(name=f"{case.name} d{d}", d=d, dv=d)
    for d in (40, 64, 128, 256, 512)
    for case in (
        Case("one token", **TOKEN | {"b": 66, "hq": 128, "hk": 2, "sk": 200}),
        Case(
            "causal",
            causal=True,
            kv_lengths=(SK, 0, 1, 130) * 6,
            **TOKEN | {"b": 24, "sq": 5, "hq": 80, "hk": 5},
        ),
    )
]


# CUDA divides the batch among CTAs that sum the gradient of one bias, and the query heads of a KV head.
PARTS = [
    Case("bias of a batch", b=6, sq=40, sk=56, hq=4, hk=2, bias=(1, 4, 40, 56), kv_lengths=(56, 40, 0, 9, 56, 56)),
    Case("row of a bias, segments", b=9, sq=70, sk=40, hq=2, bias=(1, 1, 1, 40), segments=2, softcap=3.0),
    Case("bias of a batch, ranges", b=4, sq=33, sk=70, hq=2, bias=(2, 33, 70), alibi_slopes=(4, 2), forms=("ranges",)),
    Case("one KV head", b=2, sq=140, sk=150, hq=6, hk=1, causal=True, q_lengths=(140, 77), sinks=True),
    varlen("packed, one KV head", (90, 0, 140), hq=4, hk=1, causal=True, padding=(3, 2)),
]  # fmt: skip

# A float32 tile has 128 query rows if tiles of that size have work for every SM.
SIZES_132 = {"b": 1, "hq": 68, "hk": 34, "sq": 250, "sk": 330}
LARGE_FLOAT32 = [
    case.replace(name=f"{case.name} d{d}", d=d, dv=d)
    for d in (32, 64, 96, 128, 256)
    for case in (
        Case("causal", causal=True, q_lengths=(237,), kv_lengths=(300,), sinks=True, **SIZES_132),
        Case("window", window=(100, 33), **SIZES_132),
        varlen("packed", (256, 100, 1, 240), causal=True, hq=68, hk=17, padding=(3, 2)),
    )
]


def scores(case):
    """The number of scores: rows × keys × heads."""
    if case.layout == "fixed":
        return case.b * case.hq * case.sq * case.sk
    keys = case.k_sequences or case.q_sequences
    return case.hq * sum(q * k for q, k in zip(case.q_sequences, keys, strict=True))


def in_dtypes(cases, dtypes=DTYPES):
    """Each case in every dtype; on the emulator, in one of the three in turn."""
    if not EMULATED:
        return [in_dtype(case, dtype) for case in cases for dtype in dtypes]
    return in_one_dtype(cases)


def in_one_dtype(cases):
    return [in_dtype(case, DTYPES[i % len(DTYPES)]) for i, case in enumerate(cases)]


def in_dtype(case, dtype):
    """The case with head dims that are multiples of 8, because others are padded by a copy before a kernel runs."""
    d, dv = (-(-x // 8) * 8 for x in (case.d, case.dv))
    return case.replace(name=f"{case.name}, {dtype}", dtype=dtype, d=d, dv=dv)


def check(case, deterministic=None):
    checks.check_poisoned(case, IMPLEMENTATION, deterministic)


@pytest.mark.parametrize("case", in_dtypes(EVERY_HEAD_DIM), ids=lambda case: case.name)
def test_every_head_dim(case):
    check(case)


@pytest.mark.parametrize("case", in_dtypes(EACH_MASK), ids=lambda case: case.name)
def test_each_mask(case):
    check(case)


@pytest.mark.parametrize("case", in_dtypes(PARTS), ids=lambda case: case.name)
def test_parts_of_a_batch_and_of_a_group_of_heads(case):
    check(case)


@pytest.mark.skipif(EMULATED, reason="too many heads for the emulator")
@pytest.mark.parametrize("case", in_dtypes(LARGE_FLOAT32, ("float32",)), ids=lambda case: case.name)
def test_large_float32_tiles(case):
    check(case)


@pytest.mark.skipif(EMULATED, reason="the emulator has none of Hopper's kernels")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", in_dtypes(BAND_EDGES, ("bfloat16",)), ids=lambda case: case.name)
def test_edges_of_a_band(case, deterministic):
    check(case, deterministic)


@pytest.mark.skipif(EMULATED, reason="the emulator has none of Hopper's kernels")
@pytest.mark.parametrize("window", [None, (700, 0)])
@pytest.mark.parametrize("d", [64, 128])
def test_long_groups_of_heads(d, window):
    """A long causal call is compared with the deterministic call. On Hopper, without a window, the first takes all
    heads of a group at each query tile, and the second takes one head after the other. They add dQ in different orders.
    At d 128 they also subtract delta at different times. An element of dS may then be rounded to different numbers of
    bfloat16, which are 2^-8 of the element apart."""
    q, k, v, dout = (
        jax.random.normal(jax.random.key(n), (1, 4096, 8 if 0 < n < 3 else 64, d), jnp.bfloat16)
        for n in range(4)
    )

    def gradients(deterministic):
        attend = partial(
            flash_attention,
            causal=True,
            window=window,
            deterministic=deterministic,
            implementation=IMPLEMENTATION,
        )
        return [np.asarray(x, np.float32) for x in jax.vjp(attend, q, k, v)[1](dout)]

    for got, wanted in zip(gradients(False), gradients(True), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2**-6, atol=2**-10 * np.abs(wanted).max())


@pytest.mark.skipif(EMULATED, reason="the emulator has none of Hopper's kernels")
@pytest.mark.parametrize("case", in_dtypes(ONE_OPTION, HALF), ids=lambda case: case.name)
def test_each_option_alone(case):
    for dtype in (case.dtype, "float32") if case.bias else (case.dtype,):
        check(case.replace(bias_dtype=dtype))


@pytest.mark.parametrize("case", in_dtypes(FEW_TOKENS, HALF), ids=lambda case: case.name)
def test_few_tokens_of_keys_that_are_values(case):
    check(case)


@pytest.mark.skipif(EMULATED, reason="the emulator has none of Hopper's kernels")
@pytest.mark.parametrize("case", in_dtypes(PACKED_HEADS, HALF), ids=lambda case: case.name)
def test_packed_heads(case):
    check(case)


@pytest.mark.skipif(EMULATED, reason="the emulator has none of Hopper's kernels")
@pytest.mark.parametrize("case", in_dtypes(VALUES_ARE_KEYS, HALF), ids=lambda case: case.name)
def test_values_that_are_keys(case):
    check(case)


@pytest.mark.skipif(EMULATED, reason="the emulator has none of Hopper's kernels")
@pytest.mark.parametrize("case", in_dtypes(SHORT, HALF), ids=lambda case: case.name)
def test_short_calls(case):
    check(case, deterministic=False)


@pytest.mark.skipif(EMULATED, reason="the emulator has none of Hopper's kernels")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", in_dtypes(LARGE_HEAD_DIMS, HALF), ids=lambda case: case.name)
def test_large_head_dims(case, deterministic):
    check(case, deterministic)


@pytest.mark.parametrize(
    "case",
    in_one_dtype([case for case in CASES if not EMULATED or scores(case) <= SCORES_EMULATED]),
    ids=lambda case: case.name,
)
def test_the_named_cases(case):
    check(case)


def hidden_rows(option):
    """A case, its inputs and which of its rows a mask or their segment hides from every key."""
    b, d = (1, 64) if EMULATED else (2, 128)
    case = Case("hidden rows", **SIZES | {"b": b, "d": d, "dv": d, "dtype": "bfloat16"})
    hidden = np.arange(SQ) % 7 == 3
    options = {"mask": jnp.asarray(~hidden)[:, None]}
    if option == "segments":
        segments = (hidden.astype(np.int32), np.zeros(SK, np.int32))
        options = {"segment_ids": tuple(jnp.broadcast_to(x, (b, len(x))) for x in segments)}
    return case, checks.with_arrays(make_inputs(case), **options), hidden


@pytest.mark.parametrize("option", ["mask", "segments"])
def test_rows_that_an_option_hides_from_every_key_are_not_multiplied(option):
    """Stronger than the contract: NaN in such a query, or in its cotangents, reaches no other row's gradient."""
    case, inputs, hidden = hidden_rows(option)
    spoiled = {
        name: jnp.where(hidden[:, None, None], jnp.nan, x).astype(case.dtype)
        for name, x in (("query", inputs.positional["query"]), ("dout", inputs.dout))
    }
    dirty = checks.with_arrays(inputs, **spoiled)
    wanted, got = (checks.run(case, x, IMPLEMENTATION, deterministic=True) for x in (inputs, dirty))
    checks.assert_same(got, wanted)


@pytest.mark.parametrize("option", ["mask", "segments"])
def test_rows_that_see_nothing_are_zero_whatever_values_others_see(option):
    case, inputs, hidden = hidden_rows(option)
    value = jnp.asarray(inputs.positional["value"]).at[:, 5].set(jnp.nan)
    moving, _ = oracle.split(inputs.positional | inputs.keywords | {"value": value})
    out, lse = checks.function(case, inputs, IMPLEMENTATION)(moving)
    out = np.asarray(out, np.float32)
    assert np.isnan(out[:, ~hidden]).all()
    assert (out[:, hidden] == 0).all()
    assert (np.asarray(lse)[:, :, hidden] == -np.inf).all()
