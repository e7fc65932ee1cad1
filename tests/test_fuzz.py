"""Random shapes and options, forward and backward, against the oracle: the same examples in every run."""

import os
from itertools import permutations

import checks
import equations
import numpy as np
import oracle
import pytest
from cases import DTYPES, Case, make_inputs, operands, spec, varlen
from conftest import IMPLEMENTATION
from forms import FORMS, TWO_RANGES
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st

HALF = [dtype for dtype in DTYPES if dtype != "float32"]
# JAX_FLASH_TEST_EXAMPLES is the number of cases of each layout. Each part of them is a test of its own, so that
# pytest's workers can share them. JAX_FLASH_TEST_SEED chooses other cases.
USUAL = 40
SEED = 1000 * int(os.environ.get("JAX_FLASH_TEST_SEED", 0))
EXAMPLES = int(os.environ.get("JAX_FLASH_TEST_EXAMPLES", USUAL))
PART = min(EXAMPLES, USUAL if EXAMPLES <= USUAL else 12)
in_parts = pytest.mark.parametrize("part", range(-(-EXAMPLES // PART)))

# Few sizes on each axis: those at which tiles, vectors and groups end.
HEADS = st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3), (8, 2), (6, 1)])
HEAD_DIM = st.sampled_from([1, 2, 5, 8, 16, 17, 24, 32, 40, 64, 72, 104, 136, 256, 320, 509, 512])
LENGTH = st.one_of(st.integers(0, 20), st.sampled_from([31, 32, 33, 63, 64, 65, 130]))
SIDE = st.one_of(st.none(), st.integers(0, 9), st.integers(0, 70))


def maybe(strategy):
    return st.one_of(st.none(), strategy)


@st.composite
def head_dims(draw):
    """d and dv, or None for dv if V is K."""
    d, shared = draw(HEAD_DIM), draw(st.sampled_from([False, False, False, True]))
    return dict(d=d, dv=d if shared else draw(HEAD_DIM), shared_kv=shared)


@st.composite
def scores(draw, rows, hq):
    """Options that every layout has."""
    return dict(
        causal=draw(st.booleans()),
        window=draw(maybe(st.tuples(SIDE, SIDE))),
        align=draw(st.sampled_from(["bottom_right", "top_left"])),
        scale=draw(maybe(st.sampled_from([0.0, -0.3, 0.11, 1.5]))),
        softcap=draw(maybe(st.sampled_from([0.7, 5.0, 50.0]))),
        alibi_slopes=draw(maybe(st.sampled_from([(hq,), (rows, hq)]))),
        sinks=draw(st.sampled_from([False, False, True, "token"])),
        dropout_rate=draw(st.sampled_from([0.0, 0.0, 0.25, 0.9])),
    )


@st.composite
def mask_values(draw, names):
    """Fields of a case with a mask of one or two forms, or with no mask."""
    chosen = draw(st.sampled_from([(), (), *((name,) for name in names), *permutations(names, 2)]))
    arrays = {"dense", "tiles", "function"}  # which may have different sizes
    assume(all(len(alone & {*chosen}) < 2 for alone in (TWO_RANGES | {"function"}, arrays)))
    return dict(forms=chosen, form_seed=draw(st.integers(0, 999)))


@st.composite
def fixed_cases(draw, dtypes):
    b, (hq, hk), sq, sk = draw(st.integers(1, 3)), draw(HEADS), draw(LENGTH), draw(LENGTH)

    def broadcast(*ranks):
        """A shape of one of these ranks that broadcasts to (b, hq, sq, sk): some dimensions are 1 or missing."""
        shape = [draw(st.sampled_from([1, size])) for size in (b, hq, sq, sk)]
        first = 4 - draw(st.sampled_from(ranks))
        assume(all(size == 1 for size in shape[:first]))
        return tuple(shape[first:])

    lengths = st.lists(st.integers(-2, 70), min_size=b, max_size=b).map(tuple)
    value = draw(mask_values(sorted(FORMS)))
    return Case(
        "fuzz", b=b, sq=sq, sk=sk, hq=hq, hk=hk,
        **draw(head_dims()), dtype=draw(st.sampled_from(dtypes)),
        mask=broadcast(4, 2) if not value["forms"] and draw(st.booleans()) else None,
        bias=broadcast(4, 3, 2, 1, 0) if draw(st.booleans()) else None,
        bias_dtype="float32", bias_first=draw(st.booleans()),
        segments=draw(st.sampled_from([0, 0, 1, 4])),
        q_lengths=draw(maybe(lengths)), kv_lengths=draw(maybe(lengths)),
        **draw(scores(b, hq)), **value,
    )  # fmt: skip


@st.composite
def varlen_cases(draw, dtypes):
    n, (hq, hk) = draw(st.integers(0, 5)), draw(HEADS)
    lengths = st.lists(st.one_of(st.integers(0, 12), st.sampled_from([64, 65])), min_size=n, max_size=n).map(
        tuple
    )
    return varlen(
        "fuzz", draw(lengths), k_sequences=draw(maybe(lengths)), hq=hq, hk=hk,
        padding=(draw(st.integers(0, 5)), draw(st.integers(0, 5))),
        **draw(head_dims()), dtype=draw(st.sampled_from(dtypes)),
        kv_lengths=draw(maybe(st.lists(st.integers(-2, 70), min_size=n, max_size=n).map(tuple))),
        **draw(scores(n, hq)), **draw(mask_values(sorted(FORMS))),
    )  # fmt: skip


@st.composite
def many_heads(draw):
    """Calls of few keys with KV heads for all SMs of Hopper: one for each, or four, as sequences with lengths need."""
    (hq, hk), sizes = draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1), (8, 8)])), st.integers(-1, 600)
    sq = draw(st.sampled_from([1, 13, 64, 65, 129, 200, 290]))
    sk = draw(st.sampled_from([1, 77, 128, 129, 256, 257, 385, 512, 594]))
    limited = draw(st.booleans())
    b = -(-draw(st.integers(528 if limited else 132, 560 if limited else 270)) // hk)
    assume(b * hq * sq * sk <= 30e6)  # the equations take seconds
    lengths = [
        draw(maybe(st.lists(sizes, min_size=b, max_size=b).map(tuple))) if limited else None for _ in "qk"
    ]
    d = draw(st.sampled_from([8, 40, 64, 72, 80, 96, 104, 128]))
    return Case(
        draw(st.sampled_from(["heads", "many heads"])),  # by its name a case is deterministic
        b=b, sq=sq, sk=sk, hq=hq, hk=hk, d=d, dv=draw(st.sampled_from([d, d, 64])),
        dtype=draw(st.sampled_from(HALF)), q_lengths=lengths[0], kv_lengths=lengths[1],
        causal=draw(st.booleans()), window=draw(maybe(st.tuples(SIDE, SIDE))),
        align=draw(st.sampled_from(["bottom_right", "top_left"])),
        scale=draw(maybe(st.sampled_from([0.0, -0.3, 0.11]))),
    )  # fmt: skip


# Kinds of scores, alone or with others with which they have kernels on Hopper, in fixed calls and in packed ones.
KINDS = [
    ("bias",), ("float bias",), ("segments",), ("bias", "mask"), ("bias", "mask"), ("bias", "dropout"),
    ("bias", "mask", "dropout"), ("segments", "dropout"),
]  # fmt: skip
PACKED_KINDS = [
    (), ("sinks",), ("softcap",), ("alibi",), ("form",), ("mask",), ("dropout",), ("mask", "dropout"),
    ("form", "dropout"), ("softcap", "mask"),
]  # fmt: skip


@st.composite
def few_options(draw):
    """Calls of several tiles whose options have kernels of their own on Hopper, beside some that have none."""
    b, (hq, hk) = draw(st.integers(1, 3)), draw(st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]))
    length = st.sampled_from([1, 40, 64, 127, 128, 129, 192, 200, 256, 300, 385, 512])
    packed = draw(st.sampled_from([False, False, False, True]))
    kinds = {*draw(st.sampled_from(PACKED_KINDS if packed else PACKED_KINDS + KINDS))}
    form = draw(st.sampled_from(["tiles", "tiles", "dense"] if "mask" in kinds else sorted(FORMS)))
    sizes = maybe(st.lists(st.integers(-1, 520), min_size=b, max_size=b).map(tuple))
    d = draw(st.sampled_from([8, 32, 40, 64, 80, 96, 104, 128, 192, 256, 320]))
    both = dict(
        name=draw(st.sampled_from(["few options", "some options"])),  # by its name a case is deterministic
        hq=hq, hk=hk, d=d, dv=draw(st.sampled_from([d, d, d, 64])), dtype=draw(st.sampled_from(HALF)),
        causal=draw(st.booleans()), window=draw(maybe(st.tuples(SIDE, SIDE))),
        align=draw(st.sampled_from(["bottom_right", "top_left"])),
        kv_lengths=draw(sizes), scale=draw(maybe(st.sampled_from([-0.3, 0.11]))),
        sinks="sinks" in kinds, softcap=5.0 if "softcap" in kinds else None,
        alibi_slopes=(hq,) if "alibi" in kinds else None, dropout_rate=0.25 * ("dropout" in kinds),
        forms=(form,) if {"mask", "form"} & kinds else (), form_seed=draw(st.integers(0, 999)),
    )  # fmt: skip
    if packed:
        sequences = st.lists(length, min_size=b, max_size=b).map(tuple)
        return varlen(q_sequences=draw(sequences), k_sequences=draw(maybe(sequences)), **both)
    sq, sk = draw(length), draw(length)
    shape = tuple(draw(st.sampled_from([size, size, 1])) for size in (b, hq, sq, sk))
    return Case(
        b=b, sq=sq, sk=sk, **both, q_lengths=draw(sizes), segments=4 * ("segments" in kinds),
        bias=shape if {"bias", "float bias"} & kinds else None,
        bias_dtype=both["dtype"] if "bias" in kinds else "float32",
    )  # fmt: skip


# float32 where it is built: its tolerance is one per element, so it also holds for small arrays.
SINGLE = [checks.usual_dtype(IMPLEMENTATION)]


def fuzz(cases, check, part, count=PART):
    """check(case) for `count` random cases; every run of a part draws the same ones."""

    @seed(SEED + part)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.explicit, Phase.generate),  # shrinking takes longer than reading the failing case
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def run(case):
        # A skip would end the test at the first such case.
        assume(checks.why_no_case(IMPLEMENTATION, case) is None)
        check(case)

    run()


def compare(case):
    checks.compare(case, IMPLEMENTATION, may_deviate=True, at_once=True)


@in_parts
def test_fixed(part):
    fuzz(fixed_cases(SINGLE), compare, part)


@in_parts
def test_varlen(part):
    fuzz(varlen_cases(SINGLE), compare, part)


@in_parts
def test_forward_in_16_bit(part):
    fuzz(st.one_of(fixed_cases(HALF), varlen_cases(HALF)), check_forward, part, PART // 4)


@in_parts
def test_the_largest_scores(part):
    fuzz(st.one_of(fixed_cases(DTYPES), varlen_cases(DTYPES)), check_max, part, PART // 4)


@checks.on_hopper
@pytest.mark.parametrize("part", range(-(-EXAMPLES // 5)))
def test_many_heads(part):
    fuzz(many_heads(), lambda case: checks.check_poisoned_gradients(case, IMPLEMENTATION), part, 4)


@checks.on_hopper
@pytest.mark.parametrize("part", range(-(-EXAMPLES // 5)))
def test_few_options(part):
    fuzz(few_options(), check_rows_of_many_keys, part, 4)


def check_rows_of_many_keys(case):
    """Rows that see few keys have no cotangents: their 16-bit gradients are a known deviation (docs/numerics.md)."""
    inputs = make_inputs(case)
    static, x = spec(case, inputs), operands(inputs)
    numbers = equations.numbers({name: x[name] for name in x if name != "dropout"}, np.float64)
    seen = np.zeros((*inputs.dout.shape[:-1], 1), np.int64)
    for group in equations.groups(static, numbers):
        group.set_queries(seen, equations.visible(static, numbers, group).sum(1, keepdims=True))
    many = seen >= 16
    cotangents = dict(
        dout=np.where(many, inputs.dout, 0).astype(inputs.dout.dtype),
        dlse=np.where(many[..., 0].swapaxes(-1, -2), inputs.dlse, 0),
    )
    checks.check_poisoned(case, IMPLEMENTATION, inputs=checks.with_arrays(inputs, **cotangents))


def check_max(case):
    """The largest scores are right, and out and lse are the same with and without asking for them."""
    inputs = make_inputs(case)
    moving, _ = oracle.split(inputs.positional | inputs.keywords)
    *same, largest = checks.function(case, inputs, IMPLEMENTATION, return_max=True)(moving)
    oracle.assert_max(np.asarray(largest), equations.largest(spec(case, inputs), operands(inputs)))
    for x, y in zip(same, forward(case), strict=True):
        assert np.asarray(x).tobytes() == y.tobytes()


def check_forward(case):
    (out, lse), (right, low) = forward(case), checks.references(case)
    oracle.assert_out(out, right.out, low.out, softcap=bool(case.softcap))
    oracle.assert_lse(lse, right.lse)


def forward(case):
    inputs = make_inputs(case)
    moving, _ = oracle.split(inputs.positional | inputs.keywords)
    return map(np.asarray, checks.function(case, inputs, IMPLEMENTATION)(moving))
