"""reference.py is right: against the same equations in numpy, a row at a time, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import BY_NAME, CASES, Case, Inputs, make_inputs, operands, spec, varlen

from jax_flash import reference

named = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def result(case: Case, inputs: Inputs) -> oracle.Result:
    moving, fixed = oracle.split(operands(inputs))
    return oracle.differentiate(
        lambda moving: reference.attention(spec(case, inputs), moving | fixed), moving, inputs.dout, inputs.dlse
    )


@named
def test_it_equals_the_equations_row_by_row(case):
    inputs = make_inputs(case)
    rows = oracle.by_rows(spec(case, inputs), operands(inputs), inputs.dout, inputs.dlse)
    low = rows if case.bias_dtype == "float32" else oracle.low(case, inputs)
    oracle.assert_result(result(case, inputs), rows, low, case)
