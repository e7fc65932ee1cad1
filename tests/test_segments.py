"""Segment ids in any order, over several tiles.

The kernels read only tiles of keys that may share a segment with the query tile (csrc/core/segments.h). Each case has
one dtype.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import checks
import equations
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import DTYPES, Case, Inputs, make_inputs, operands, spec
from conftest import IMPLEMENTATION
from test_forward_mode import assert_near, rounded_tangents, tangents_of

Arrays = dict[str, Any]

EMULATED = "emulated" in sys.modules  # the pytest plugin of tests/kernels/emulator
LOWEST, HIGHEST = -(2**31), 2**31 - 1


def runs(numbers: tuple[int, ...], size: int) -> np.ndarray:
    """Segment ids of runs of equal length, one for each of these numbers."""
    return np.repeat(numbers, -(-size // len(numbers)))[:size]


def padded(size: int) -> np.ndarray:
    documents = runs(tuple(range(1, 12)), size)
    documents[-size // 5 :] = 0
    return documents


# Each function makes the segment ids of queries or keys from their number.
NUMBERINGS: dict[str, Callable[[int], np.ndarray]] = {
    "in order": lambda size: runs((0, 1, 2, 3, 4), size),
    "in order, then padding": padded,
    "descending, negative": lambda size: runs((3, 0, -1, -7), size),
    "out of order": lambda size: runs((5, 900, 5, LOWEST, HIGHEST, 900, -3), size),
    "the same number modulo 64": lambda size: runs((0, 64, 128, -64, 64), size),
    "in turn": lambda size: np.arange(size) % 3,
    "shorter than a tile": lambda size: np.arange(size) // 7,
    "one": lambda size: np.full(size, 4),
}

SQ, SK = (150, 170) if EMULATED else (390, 1100)
SIZES = {"b": 2, "sq": SQ, "sk": SK, "hq": 2, "hk": 1, "d": 64, "dv": 64, "segments": 1}
SHORTER = {"q_lengths": (SQ - 7, 64), "kv_lengths": (SK - 20, 130)}
BANDS = {
    "all": {},
    "causal": {"causal": True},
    "top left, shorter": {"causal": True, "align": "top_left", **SHORTER},
    "window, bias": {"window": (90, 30), "bias": (1, 2, SQ, SK)},
    "bias of keys": {"bias": (1, 1, 1, SK), "dropout_rate": 0.2},
}
# Each numbering is combined with two of the bands.
CASES = [
    Case(f"{numbering}: {band}", **SIZES | BANDS[band])
    for i, numbering in enumerate(NUMBERINGS)
    for band in (list(BANDS)[i % 5], list(BANDS)[(i + 2) % 5])
]


def numbered(case: Case, seed: int = 0) -> Inputs:
    """The case's inputs, with the segments that its name says. The second batch entry has them in reverse."""
    numbering = NUMBERINGS[case.name.split(": ")[0]]
    inputs = make_inputs(case, seed)
    ids = tuple(
        jnp.asarray(np.stack([numbering(size), numbering(size)[::-1]]), jnp.int32)
        for size in (case.sq, case.sk)
    )
    return checks.with_arrays(inputs, segment_ids=ids)


@pytest.mark.parametrize(
    "case",
    [case.replace(dtype=DTYPES[i % 3]) for i, case in enumerate(CASES)],
    ids=lambda case: f"{case.name}, {case.dtype}",
)
def test_any_numbering(case: Case) -> None:
    checks.require(
        IMPLEMENTATION, "forward", "backward", "bias_gradient", "tangent", dtype=case.dtype, d=64, dv=64
    )
    inputs = numbered(case)
    moving, _ = oracle.split(operands(inputs))
    tangents = tangents_of(moving)
    call = checks.function(case, inputs, IMPLEMENTATION)
    got = oracle.differentiate(call, moving, inputs.dout, inputs.dlse)
    tangent = jax.jit(lambda *x: jax.jvp(call, x[:1], x[1:])[1])(moving, tangents)
    oracle.assert_result(got, *oracle.references(case, inputs), case)
    arrays = operands(inputs)
    exact = equations.tangents(spec(case, inputs), arrays, tangents)
    assert_near(case, tangent, exact, rounded_tangents(case, arrays, inputs, tangents))


# In rows. Every query tile lies in one document. A key tile that holds two documents reaches into the BORDER of each,
# but not beyond.
DOCUMENT, BORDER = (128, 32) if EMULATED else (768, 192)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_other_segments_are_stepped_over(causal: bool, deterministic: bool) -> None:
    """NaN in the middle of a segment reaches no row in the middle of another, since no product reads both."""
    dtype = checks.usual_dtype(IMPLEMENTATION)
    size = 3 * DOCUMENT
    case = Case("three documents", b=1, sq=size, sk=size, hq=2, hk=1, d=64, dv=64, causal=causal, dtype=dtype)
    checks.require(IMPLEMENTATION, "forward", "backward", "tangent", dtype=dtype, d=64, dv=64)
    ids = jnp.asarray(runs((9, -4, 700), size)[None], jnp.int32)
    inputs = checks.with_arrays(make_inputs(case), segment_ids=(ids, ids))
    moving, _ = oracle.split(operands(inputs))
    call = checks.function(case, inputs, IMPLEMENTATION, deterministic=deterministic)

    @jax.jit
    def run(moving: Arrays, tangents: Arrays, dout: jax.Array) -> Any:
        (out, _), pullback = jax.vjp(call, moving)
        gradients = pullback((dout, inputs.dlse))[0]
        return out, jax.jvp(call, (moving,), (tangents,))[1][0], *gradients.values()

    document, at = np.divmod(np.arange(size), DOCUMENT)
    middle = (at >= BORDER) & (at < DOCUMENT - BORDER)
    for bad in (1,) if EMULATED else range(3):
        hidden = (middle & (document == bad))[:, None, None]
        operands_ = (moving, tangents_of(moving), inputs.dout)
        spoiled = jax.tree.map(
            lambda x, hidden=hidden: jnp.where(hidden, jnp.nan, x).astype(x.dtype), operands_
        )
        for x in run(*spoiled):
            assert np.isfinite(np.asarray(x, np.float32)[0, middle & (document != bad)]).all()
