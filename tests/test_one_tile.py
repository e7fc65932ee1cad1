"""Sequences whose queries and keys lie in one tile each: CUDA kernels of design one_tile, and when plan() takes them.

The plan needs no GPU. The kernels run on a GPU, or on the emulator (`make cuda-emulate`).
"""

from __future__ import annotations

import sys
from typing import Any

import checks
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import Case, make_inputs
from conftest import IMPLEMENTATION
from plans import A100, H100, plan, tile

from jax_flash import flash_attention, masks

EMULATED = "emulated" in sys.modules
on_kernels = pytest.mark.skipif(
    not EMULATED and IMPLEMENTATION != "cuda", reason="neither a GPU's kernels nor emulated ones are tested"
)
SIZES = ((32, 32), (64, 64), (49, 49), (1, 7), (17, 33), (33, 17), (64, 5), (5, 64), (16, 16))
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "top left": {"causal": True, "align": "top_left"},
    "window": {"window": (9, 3)},
    "lengths": {"q_lengths": (3, 0), "kv_lengths": (0, 5), "causal": True},
    "lengths, softcap": {"q_lengths": (3, 0), "kv_lengths": (0, 5), "softcap": 3.0},
    "bias": {"bias": "heads"},
    "bias of a batch": {"bias": "all", "bias_dtype": "float32", "softcap": 3.0},
    "mask": {"mask": "heads"},
    "segments": {"segments": 3},
    "sinks": {"sinks": True},
    "sinks by token": {"sinks": "token", "causal": True},
    "slopes": {"alibi_slopes": (8,)},
    "dropout": {"dropout_rate": 0.3},
    "negative scale": {"scale": -0.3},
}


def case_of(option: str, sq: int, sk: int, d: int, dtype: str) -> Case:
    arrays = {"heads": (1, 8, sq, sk), "all": (2, 8, sq, sk)}
    options = {k: arrays.get(v, v) if isinstance(v, str) else v for k, v in OPTIONS[option].items()}
    if "q_lengths" in options:
        options |= {"q_lengths": (min(3, sq), 0), "kv_lengths": (0, min(5, sk))}
    sizes = {"b": 2, "hq": 8, "hk": 2 if option in ("plain", "bias", "causal") else 8, "sq": sq, "sk": sk}
    return Case(f"{option} {sq} × {sk} d{d}, {dtype}", d=d, dv=d, dtype=dtype, **sizes, **options)


CASES = [
    case_of(option, *size, d=(32, 64, 24, 40)[(i + j) % 4], dtype=("bfloat16", "float16")[(i // 2 + j) % 2])
    for i, option in enumerate(OPTIONS)
    for j, size in enumerate(SIZES)
    if not EMULATED or (i + j) % 3 == 0
]

# More heads than SMs, so that decode does not run few queries; unequal head dims, of which the larger counts.
CASES += [
    Case(f"{sq} of many heads, {dtype}", b=70, hq=hq, hk=2, sq=sq, sk=20, d=32, dv=dv, dtype=dtype)
    for sq, hq, dv, dtype in (
        (1, 2, 32, "bfloat16"),
        (8, 2, 64, "float16"),
        (20, 2, 16, "bfloat16"),
        (20, 6, 32, "float16"),
    )
]


@on_kernels
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_results_and_gradients(case):
    checks.check_poisoned_gradients(case, IMPLEMENTATION)


@on_kernels
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_repeat(deterministic):
    """dQ is complete in one CTA, so that nothing is added in an order that may change."""
    checks.assert_gradients_repeat([(8, 49, 4, 32)] * 4, IMPLEMENTATION, deterministic=deterministic)


@on_kernels
def test_keys_that_no_row_sees_are_not_read():
    """Where a batch entry has no query, its gradients are 0 whatever its keys and values hold."""
    sizes = {"sq": 40, "sk": 40, "hq": 4, "hk": 4, "d": 32, "dv": 32}
    case = Case("no query", q_lengths=(0, 40), dtype="bfloat16", **sizes)
    inputs = make_inputs(case)
    spoiled = {name: inputs.positional[name].at[0].set(np.nan) for name in ("key", "value")}
    got = checks.run(case, checks.with_arrays(inputs, **spoiled), IMPLEMENTATION)
    for name in ("query", "key", "value"):
        gradient = got.gradients[name].astype(np.float32)
        assert (gradient[0] == 0).all()
        assert np.isfinite(gradient[1]).all()
        assert (gradient[1] != 0).any()


@on_kernels
def test_ranges_and_the_largest_score():
    """Masks as values, and return_max, in kernels that skip no tile."""
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 40, 4, 32), jnp.bfloat16) for i in range(3))
    mask = masks.prefix_lm(jnp.array([7, 0]))

    def attend(implementation):
        return flash_attention(q, k, v, mask=mask, return_max=True, implementation=implementation)

    (out, most), (_, largest) = attend(IMPLEMENTATION), attend("xla")
    at = np.arange(40)
    seen = np.stack([(at <= at[:, None]) | (at < prefix) for prefix in (7, 0)])
    oracle.assert_out(np.asarray(out), *oracle.plain_outs(q, k, v, seen))
    oracle.assert_max(np.asarray(most), np.asarray(largest))


def design(**options: Any) -> str:
    sizes = {"d": 32, "dv": 32, "q_rows": 49, "k_rows": 49, "batch": 1024, "heads": 4, "kv_heads": 4}
    return plan(**sizes | options)["row"]["design"]


@pytest.mark.parametrize("pass_", ["forward", "backward"])
@pytest.mark.parametrize("device", [H100, A100])
def test_one_tile_holds_up_to_64_queries_and_keys(pass_, device):
    call: dict[str, Any] = {"pass_": pass_, "device": device}
    for d in (8, 32, 64):
        of: dict[str, Any] = {"d": d, "dv": d}
        sizes = {"q_rows": 32, "k_rows": 32, "batch": 512, "heads": 8, "kv_heads": 8}
        assert tile(plan(**call, **of, **sizes)) == (32, 32)
        if d == 64 and pass_ == "forward":  # no row: Hopper's tiles of 128 rows are faster
            assert design(**call, **of) == "tiles"
            continue
        assert design(**call, **of) == design(**call, **of, q_rows=64, k_rows=64) == "one_tile"
        assert design(**call, **of, q_rows=65) == design(**call, **of, k_rows=65) == "tiles"
        assert tile(plan(**call, **of, **sizes | {"k_rows": 33})) == (64, 64)
    for name in ("bias", "mask", "q_segment_ids", "ranges", "dropout", "sinks", "kv_lengths"):
        assert design(**call, operands=(name,)) == "one_tile"
    assert design(**call, d=72, dv=72) != "one_tile"
    assert design(**call, dtype="float32") == design(**call, varlen=True) == "tiles"


def test_a_gradient_in_one_tile_needs_no_sums():
    for deterministic in (False, True):
        chosen = plan("backward", d=32, dv=32, q_rows=49, k_rows=49, batch=1024, deterministic=deterministic)
        assert (chosen["row"]["design"], chosen["workspace"]) == ("one_tile", 0)


def test_decode_runs_where_query_heads_share_keys_or_heads_are_few():
    few: dict[str, Any] = {"q_rows": 1, "k_rows": 64, "batch": 64}
    assert design(**few) == "one_tile"
    assert design(**few | {"batch": 33}) != "one_tile"  # 132 heads, as many as SMs
    assert plan(**few, d=32, dv=32, heads=8, kv_heads=2)["row"]["pass"] == "decode"


def test_gradients_of_few_kv_heads_are_divided():
    heads: dict[str, Any] = {"pass_": "backward", "heads": 64}
    assert design(**heads, kv_heads=64, batch=1) == "one_tile"
    assert design(**heads, kv_heads=8, batch=8) == "tiles"
    assert design(**heads, kv_heads=8, batch=17) == "one_tile"
