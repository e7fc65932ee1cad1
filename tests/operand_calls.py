"""Calls with operands by name, below the public functions, and their results by the equations."""

from __future__ import annotations

from dataclasses import replace

import equations
import jax.numpy as jnp
import numpy as np
import oracle
from cases import Case, spec
from conftest import IMPLEMENTATION

from jax_flash.autodiff import attend
from jax_flash.operands import OPTIONAL

HEAD_DIMS = (64, 128, 256) if IMPLEMENTATION == "cuda" else (64,)  # of Hopper's kernels for masks
SIZES = {"b": 2, "sq": 300, "sk": 520}
GROUPS = {"hq": 4, "hk": 2}
SEVERAL_TILES = [
    Case("every key", **SIZES | GROUPS),
    Case("causal", causal=True, **SIZES | GROUPS),
    Case("window", window=(200, 30), **SIZES | {"hq": 2, "hk": 2}),
    Case("lengths", q_lengths=(300, 77), kv_lengths=(333, 520), **SIZES | GROUPS),
]
SINKS_AND_LENGTHS = Case(
    "sinks, causal, lengths", sinks=True, causal=True, kv_lengths=(65, 0), **SIZES | GROUPS
)


def references(case, static, inputs, arrays):
    """The equations in float64, and with S and P rounded to the dtype of the case."""
    right = equations.attention(static, arrays, inputs.dout, inputs.dlse)
    if case.dtype == "float32":
        return right, right
    low = equations.attention(
        static, arrays, inputs.dout, inputs.dlse, dtype=np.float32, round_to=jnp.dtype(case.dtype)
    )
    gradients = {name: x.astype(arrays[name].dtype) for name, x in low.gradients.items()}
    return right, equations.Result(low.out.astype(case.dtype), low.lse, gradients)


def static_of(case, inputs, arrays, **options):
    return replace(spec(case, inputs), operands=tuple(name for name in OPTIONAL if name in arrays), **options)


def differentiate(case, inputs, arrays, implementation, **options):
    """Results and gradients of the call of `case` with these operands."""
    run = static_of(case, inputs, arrays, implementation=implementation, **options)
    moving, fixed = oracle.split(arrays)
    return oracle.differentiate(lambda x: attend(run, x | fixed), moving, inputs.dout, inputs.dlse)
