"""What dot_product_attention refuses, and how it says so."""

import jax
import jax.numpy as jnp
import pytest
from test_dot_product import B, K, N, S, T, qkv

from jax_flash.dot_product import dot_product_attention

Q, KEY, VALUE = qkv()
WRONG = {
    "rank": ({"query": Q[0, 0]}, ValueError, "query has rank 2; allowed are 3 .* and 4"),
    "key dtype": (
        {"key": KEY.astype(jnp.bfloat16)},
        ValueError,
        "key has dtype bfloat16, .* query's float32",
    ),
    "value dtype": ({"value": VALUE.astype(jnp.float16)}, ValueError, "value has dtype float16"),
    "value shape": (
        {"value": VALUE[..., :8]},
        ValueError,
        r"value has shape \(2, 13, 2, 8\), which differs from key's",
    ),
    "batch": (
        {"key": KEY[:1], "value": VALUE[:1]},
        ValueError,
        "key has batch size 1, which differs from query's 2",
    ),
    "head dim": ({"query": Q[..., :8]}, ValueError, "key has head dim 16, which differs from query's 8"),
    "heads": ({"query": Q[:, :, :3]}, ValueError, "key has 2 heads, which does not divide query's 3"),
    "integers": (
        {"query": Q.astype(int), "key": KEY.astype(int), "value": VALUE.astype(int)},
        TypeError,
        "query has dtype int32",
    ),
    "mask dtype": ({"mask": jnp.ones((T, S))}, ValueError, "mask has dtype float32, allowed is bool"),
    "mask of rank 3": (
        {"mask": jnp.ones((2, T, S), bool)[:, :, :-1]},
        ValueError,
        r"mask must broadcast to .* got shape \(2, \d+, \d+\): \[:, None\] makes",
    ),
    "no key": ({"key": None}, TypeError, "key must be an array, got None"),
    "no value": ({"value": None}, TypeError, "value must be an array, got None; pass key where V is K"),
    "mask shape": ({"mask": jnp.ones((K, T, S), bool)}, ValueError, r"mask .* to .*\(2, 4, 9, 13\)"),
    "text": ({"bias": "x"}, TypeError, "bias must be an array, got 'x'"),
    "complex bias": (
        {"bias": jnp.ones((T, S), complex)},
        TypeError,
        "bias has dtype complex64, allowed are real numbers",
    ),
    "mask rank": ({"mask": jnp.ones((1, B, N, T, S), bool)}, ValueError, "mask must broadcast to"),
    "bias shape": ({"bias": jnp.ones((T, 2))}, ValueError, r"bias must broadcast to .*got shape \(9, 2\)"),
    "lengths dtype": (
        {"query_seq_lengths": jnp.ones(2)},
        TypeError,
        "query_seq_lengths must be int32, got float32",
    ),
    "lengths shape": (
        {"key_value_seq_lengths": jnp.ones(3, jnp.int32)},
        ValueError,
        r"key_value_seq_lengths must have shape .*\(3,\)",
    ),
    "negative window": (
        {"local_window_size": (-1, 2)},
        ValueError,
        r"local_window_size is \(-1, 2\); allowed",
    ),
    "odd window": (
        {"local_window_size": (1, 2, 3)},
        ValueError,
        r"local_window_size is \(1, 2, 3\); allowed",
    ),
    "float window": ({"local_window_size": 1.5}, ValueError, "local_window_size is 1.5; allowed"),
    "cudnn": (
        {"implementation": "cudnn"},
        NotImplementedError,
        'implementation is "cudnn"; allowed are None, "cuda"',
    ),
    "is_causal": ({"is_causal": 1}, TypeError, "is_causal must be True or False, got 1"),
    "return_residual": (
        {"return_residual": "no"},
        TypeError,
        "return_residual must be True or False, got 'no'",
    ),
    "implementation": ({"implementation": "triton"}, ValueError, "implementation .*'triton'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name):
    arguments, error, message = WRONG[name]
    with pytest.raises(error, match="^dot_product_attention: " + message):
        dot_product_attention(**({"query": Q, "key": KEY, "value": VALUE} | arguments))


def test_int64_lengths_are_type_errors():
    with jax.enable_x64(True), pytest.raises(TypeError, match="query_seq_lengths must be int32, got int64"):
        dot_product_attention(Q, KEY, VALUE, query_seq_lengths=jnp.array([1, 2], jnp.int64))


@pytest.mark.parametrize("implementation", ["cpu", "cuda"])
def test_float64_with_an_own_implementation_raises(implementation):
    with (
        jax.enable_x64(True),
        pytest.raises(NotImplementedError, match=r'query is float64, .* use "xla" or None'),
    ):
        dot_product_attention(
            *(x.astype(jnp.float64) for x in (Q, KEY, VALUE)), implementation=implementation
        )
