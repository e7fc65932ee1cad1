"""docs/trouble.md quotes the messages that a user sees."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jax_flash import flash_attention, flash_attention_varlen

PAGE = (Path(__file__).parent.parent / "docs" / "trouble.md").read_text()
QUOTED = [quote.removesuffix(" …") for quote in re.findall(r"^- `([^`]*)`:", PAGE, re.MULTILINE)]
X = jnp.ones((1, 8, 2, 8))


def second_derivative(x):
    return jax.grad(lambda x: jax.grad(lambda x: flash_attention(x, x, x).sum())(x).sum())(x)


MISTAKES = {
    "dtype float64": lambda: jax.eval_shape(flash_attention, *[jax.ShapeDtypeStruct(X.shape, "float64")] * 3),
    "got int64": lambda: jax.eval_shape(
        flash_attention_varlen, X[0], X[0], X[0], jax.ShapeDtypeStruct((2,), "int64")
    ),
    "scale": lambda: jax.jit(lambda s: flash_attention(X, X, X, scale=s))(0.1),
    "second derivative": lambda: jax.jit(second_derivative)(X),
    "tpu": lambda: jax.jit(lambda x: flash_attention(x, x, x)).trace(X).lower(lowering_platforms=("tpu",)),
    "Cannot serialize": lambda: jax.export.export(jax.jit(lambda x: flash_attention(x, x, x)))(X),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_page_quotes_the_message_of(mistake):
    (quote,) = (quote for quote in QUOTED if mistake in quote)
    x64 = jax.enable_x64("64" in mistake)  # without x64, JAX would make float32 and int32 of the shapes
    with x64, pytest.raises((ValueError, TypeError, NotImplementedError)) as raised:
        MISTAKES[mistake]()
    assert quote in str(raised.value)
