"""Hopper's kernels for head dims above 64, up to 96, whose tiles have columns and rows that no call uses."""

import pytest
from cases import Case, varlen
from test_several_tiles import EMULATED, HALF, OTHER_KEYS, check, in_dtypes

if EMULATED:
    pytest.skip("the emulator has none of Hopper's kernels", allow_module_level=True)

# 280 rows are three tiles of 96, which the backward takes up to head dim 80, and five of 64, which it takes otherwise.
SIZES = {"b": 2, "hq": 4, "hk": 2, "sq": 280, "sk": 420}
# The forward has tiles of 192 queries (tests of plans).
MANY = {"b": 3, "hq": 68, "hk": 34, "sq": 470, "sk": 430}
CASES = [
    case.replace(name=f"{case.name} d{d}/{dv}", d=d, dv=dv)
    for d, dv in ((72, 72), (80, 80), (96, 96), (80, 40), (64, 88))
    for case in (
        Case("full", **SIZES),
        Case("causal, sinks", causal=True, sinks=True, **SIZES),
        Case("window, lengths", window=(100, 33), q_lengths=(273, 0), kv_lengths=(420, 97), **SIZES),
        Case("top left", causal=True, align="top_left", **SIZES | {"sq": 353}),
        Case("tiles of 64 queries", causal=True, **SIZES | {"sq": 320}),
        Case("clusters of key tiles", causal=True, kv_lengths=(200,), **SIZES | {"b": 1, "sk": 250}),
        Case("more tiles than workers", **MANY | {"sk": 290}),
        Case("large tiles, causal, sinks", causal=True, sinks=True, **MANY),
        Case("large tiles, window", window=(290, 20), **MANY),
        Case("large tiles, lengths", causal=True, q_lengths=(470, 13, 200), kv_lengths=(430, 97, 0), **MANY),
        Case("large tiles, last 32 keys", **MANY | {"sk": 336 + 32}),
        varlen("large tiles, packed", (470, 300, 700), causal=True, hq=68, hk=34),
        Case("one query", **SIZES | {"sq": 1}),
        Case("few queries, many heads", **SIZES | {"b": 40, "hq": 8, "hk": 8, "sq": 77, "sk": 77}),
        varlen("packed", (300, 1, 0, 200, 97), causal=True, hq=4, hk=2, **OTHER_KEYS),
        varlen("packed, few tokens", (96, 3, 192, 33) * 5, hq=8, hk=4, padding=(7, 2)),
    )
]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", in_dtypes(CASES, HALF), ids=lambda case: case.name)
def test_between_64_and_96(case, deterministic):
    check(case, deterministic)
