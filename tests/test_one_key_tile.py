"""Calls whose keys all lie in one key tile of Hopper's backward, so that its CTA stores dQ, and when plan() does so.

The plan needs no GPU. Other implementations have such calls in other files.
"""

from __future__ import annotations

from typing import Any

import checks
import pytest
from cases import Case
from conftest import IMPLEMENTATION
from plans import A100, plan

# Query tiles that see no key before and after those that do; several query tiles, the last one shorter.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "top left": {"causal": True, "align": "top_left"},
    "window": {"window": (20, 9)},
    "window, top left": {"window": (20, 9), "align": "top_left"},
    "lengths": {"q_lengths": (150, 0, 3), "kv_lengths": (70, 5, 0)},
    "lengths, causal": {"q_lengths": (150, 7, 290), "kv_lengths": (70, 70, 31), "causal": True},
    "negative scale": {"scale": -0.3},
}
SIZES = ((290, 77), (129, 128), (100, 1), (1, 100), (64, 65))


def case_of(option: str, sq: int, sk: int, d: int, dtype: str) -> Case:
    options = dict(OPTIONS[option])
    for name, rows in (("q_lengths", sq), ("kv_lengths", sk)):
        if name in options:
            options[name] = tuple(min(x, rows) for x in options[name])
    sizes = {"b": 3, "hq": 4, "hk": 2 if d == 64 else 4, "sq": sq, "sk": sk}
    name = f"{option}, {sq} queries, {sk} keys, d{d}, {dtype}"
    return Case(name, d=d, dv=d, dtype=dtype, **sizes, **options)


CASES = checks.crossed(case_of, OPTIONS, SIZES)
# Each CTA takes several heads, or a part of a KV head's query heads; unequal head dims.
CASES += [
    Case(f"{name}, d{d} and {dv}", d=d, dv=dv, dtype="bfloat16", sk=90, **sizes)
    for d, dv in ((64, 64), (128, 128), (80, 80), (96, 96), (64, 32), (72, 128))
    for name, sizes in (
        ("many heads", {"b": 105, "hq": 4, "hk": 4, "sq": 33, "causal": True}),
        ("many heads of two query tiles", {"b": 67, "hq": 8, "hk": 4, "sq": 70}),
        ("one KV head", {"b": 1, "hq": 8, "hk": 1, "sq": 400}),
    )
]


@checks.on_hopper
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_results_and_gradients(case):
    checks.check_poisoned_gradients(case, IMPLEMENTATION)


@checks.on_hopper
@pytest.mark.parametrize("d", [64, 128])
def test_gradients_repeat(d):
    """Nothing is added in an order that may change, even where that is not asked for."""
    shapes = ((40, 200, 4, d), (40, 128, 4, d), (40, 128, 4, d), (40, 200, 4, d))
    checks.assert_gradients_repeat(shapes, IMPLEMENTATION)


def test_a_key_tile_with_all_keys_needs_no_sums_of_dq():
    sizes = {"heads": 16, "kv_heads": 16, "batch": 64, "q_rows": 1000, "k_rows": 128}

    def workspace(**options: Any) -> int:
        return plan("backward", **sizes | options)["workspace"]

    for d in (32, 64, 80, 96, 128):
        assert workspace(d=d, dv=d) == workspace(d=d, dv=d, deterministic=True, right=0) == 0
    assert workspace(operands=("q_lengths", "kv_lengths")) == 0
    assert workspace(varlen=True) >= 1000 * 16 * 64 * 4
    for more in ({"k_rows": 513}, {"softcap": 3.0}, {"d": 256, "dv": 256}, {"device": A100}):
        assert workspace(**more) >= 64 * 1000 * 16 * 64 * 4
    parts = plan("backward", d=64, dv=64, heads=16, kv_heads=1, batch=1, q_rows=4000, k_rows=128)
    assert parts["keys"]["blocks"] > 1
    assert parts["workspace"] < 4000 * 16 * 64 * 4  # only the parts' sums of dK and dV
