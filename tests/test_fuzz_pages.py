"""Random calls over pages, against the oracle: a few tokens of many sequences, packed or not, with prompts among
them."""

from __future__ import annotations

import numpy as np
import pages
from cases import Case, varlen
from conftest import IMPLEMENTATION
from hypothesis import strategies as st
from pages import FLOAT8, paged
from test_fuzz import HALF, PART, SIDE, SINGLE, fuzz, in_parts, maybe

# Kernels differ by the number of tokens, by that of heads that share keys, and by the only option of a call.
HEADS = st.sampled_from([(1, 1), (8, 2), (16, 2), (32, 8), (6, 2), (16, 1), (64, 1)])
HEAD_DIM = st.sampled_from([8, 40, 64, 64, 104, 128, 128, 256, 320])
KINDS = st.sampled_from(
    [(), (), ("sinks",), ("softcap",), ("alibi",), ("draft",), ("scale",), ("softcap", "alibi", "draft")]
)


@st.composite
def calls_over_pages(draw):
    n, (hq, hk), d, kinds = draw(st.integers(1, 24)), draw(HEADS), draw(HEAD_DIM), draw(KINDS)
    keys = st.one_of(st.integers(0, 40), st.integers(0, 400))
    lengths = tuple(draw(st.lists(keys, min_size=n, max_size=n)))
    rows = draw(st.sampled_from([1, 2, 3, 5, 9, 17, 33]))
    options = dict(
        hq=hq, hk=hk, d=d, dv=d, dtype=draw(st.sampled_from(HALF + SINGLE)), causal=draw(st.booleans()),
        window=draw(maybe(st.tuples(SIDE, SIDE))), form_seed=draw(st.integers(0, 999)),
    )  # fmt: skip
    of_kind = dict(
        sinks=st.sampled_from([True, "token"]), softcap=st.sampled_from([0.7, 70.0]),
        alibi_slopes=st.sampled_from([(hq,), (n, hq)]), scale=st.sampled_from([0.0, -0.1, 0.11]),
        draft_mask=st.just((n, rows, rows)),
    )  # fmt: skip
    options |= {name: draw(value) for name, value in of_kind.items() if name.split("_")[0] in kinds}
    if draw(st.booleans()):
        return Case("pages", b=n, sq=rows, sk=max(lengths), kv_lengths=lengths, **options)
    counts = draw(st.lists(st.sampled_from([0, 1, 1, 2, 3, 5, 5, 9, 17]), min_size=n, max_size=n))
    if draw(st.booleans()):
        counts[draw(st.integers(0, n - 1))] = draw(st.integers(30, 200))  # a prompt
    padding = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    return varlen("pages", tuple(counts), k_sequences=lengths, padding=padding, **options)


def check(case):
    rng = np.random.default_rng(case.form_seed)
    float8 = [None, None, *FLOAT8][rng.integers(4)] if case.d % 16 == 0 and case.dtype in HALF else None
    size, layout = (8, 16, 24, 64)[rng.integers(4)], ("nhd", "hnd")[rng.integers(2)]
    pages.check(paged(case, size, layout, float8, by_page=bool(rng.integers(2))), IMPLEMENTATION)


@in_parts
def test_pages(part):
    fuzz(calls_over_pages(), check, part, PART // 4)
