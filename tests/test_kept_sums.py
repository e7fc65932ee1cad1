"""Calls of a few key tiles whose KV heads suffice for all SMs, so that CTAs of Hopper's backward go through all key
tiles of a KV head and keep its sums of dQ, and when plan() does so.

The plan needs no GPU. Other implementations have such calls in other files.
"""

from __future__ import annotations

from typing import Any

import checks
import numpy as np
import pytest
from cases import Case
from conftest import IMPLEMENTATION
from plans import A100, plan

# On a GPU with 132 SMs: one KV head for each, and four, as sequences with lengths need.
ONE_WAVE = {"b": 33, "hq": 4, "hk": 4}
FOUR_WAVES = {"b": 66, "hq": 8, "hk": 8}


def lengths(rows: int, seed: int, count: int = FOUR_WAVES["b"]) -> tuple[int, ...]:
    """Among them 0, 1, and all rows."""
    drawn = np.random.default_rng(seed).integers(0, rows + 1, count)
    drawn[:3] = 0, 1, rows
    return tuple(int(x) for x in drawn)


# Query tiles that see no key, one key tile, and several of them, in the order in which they see them.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "top left": {"causal": True, "align": "top_left"},
    "window": {"window": (90, 40)},
    "narrow window, top left": {"window": (2, 1), "align": "top_left"},
    "left window": {"window": (150, None), "align": "top_left"},
    "lengths": {"q_lengths": 1, "kv_lengths": 2},
    "lengths, causal": {"q_lengths": 3, "kv_lengths": 4, "causal": True},
    "kv_lengths": {"kv_lengths": 5},
    "negative scale": {"scale": -0.3},
}
SIZES = ((290, 140), (200, 256), (130, 385), (129, 500), (400, 257))


def case_of(option: str, sq: int, sk: int, d: int, dtype: str) -> Case:
    options = dict(OPTIONS[option])
    sizes = ONE_WAVE
    for name, rows in (("q_lengths", sq), ("kv_lengths", sk)):
        if name in options:
            options[name] = lengths(rows, options[name])
            sizes = FOUR_WAVES
    if d == 64:
        sizes = sizes | {"hq": 2 * sizes["hk"]}
    name = f"{option}, {sq} queries, {sk} keys, d{d}, {dtype}"
    return Case(name, d=d, dv=d, dtype=dtype, sq=sq, sk=sk, **sizes, **options)


CASES = checks.crossed(case_of, OPTIONS, SIZES)
CASES += [
    Case(f"{name}, d{d} and {dv}", d=d, dv=dv, dtype="bfloat16", **sizes)
    for d, dv in ((64, 64), (128, 128), (80, 80), (96, 96), (64, 32), (72, 128))
    for name, sizes in (
        ("several heads for each CTA", {"b": 33, "hq": 8, "hk": 8, "sq": 170, "sk": 200, "causal": True}),
        ("groups of four heads", {"b": 66, "hq": 8, "hk": 2, "sq": 150, "sk": 140}),
        ("parts of a group", {"b": 33, "hq": 4, "hk": 1, "sq": 150, "sk": 300}),
    )
]


@checks.on_hopper
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_results_and_gradients(case):
    checks.check_poisoned_gradients(case, IMPLEMENTATION)


@checks.on_hopper
@pytest.mark.parametrize("d", [64, 128])
def test_gradients_repeat(d):
    """The order of additions does not change, even where that is not asked for."""
    shapes = ((33, 200, 4, d), (33, 256, 4, d), (33, 256, 4, d), (33, 200, 4, d))
    checks.assert_gradients_repeat(shapes, IMPLEMENTATION)


def test_who_keeps_sums_of_dq():
    """By the workspace: the sums of the heads that CTAs work on, or of all heads."""
    sizes = {"d": 64, "dv": 64, "heads": 16, "kv_heads": 16, "batch": 66, "q_rows": 512, "k_rows": 512}
    row = 4 * 64

    def workspace(**options: Any) -> int:
        return plan("backward", **sizes | options)["workspace"]

    kept = 132 * 512 * row
    assert workspace() == workspace(deterministic=True) == kept
    assert workspace(operands=("q_lengths", "kv_lengths")) == kept + 256  # a counter of heads
    assert workspace(heads=32, q_rows=256) == 132 * 2 * 256 * row
    every = 66 * 16 * 512 * row
    for more in ({"softcap": 3.0}, {"device": A100}, {"k_rows": 513}, {"q_rows": 700}):
        assert workspace(**more) >= every
    assert workspace(varlen=True) >= 16 * 512 * row
    assert workspace(batch=24, operands=("kv_lengths",)) >= 24 * 16 * 512 * row  # three waves
    assert workspace(batch=9) >= 9 * 16 * 512 * row  # 144 heads
    assert workspace(q_rows=700, right=0) == workspace(q_rows=700, k_rows=256) == 132 * 768 * row
