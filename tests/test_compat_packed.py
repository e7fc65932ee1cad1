"""flash_attn's functions with q, k and v, or k and v, in one array give what those with separate arrays give."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flash_attn_reference import CU_K, CU_Q, HK, HQ, OPTIONS, D, i32, normal

from jax_flash.compat.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

Q, KV = normal(0, 3, 6, HQ, D), normal(1, 3, 9, 2, HK, D)
QKV = normal(2, 3, 7, 3, HQ, D)
PACKED_Q, PACKED_KV, PACKED_QKV = normal(3, 8, HQ, D), normal(4, 12, 2, HK, D), normal(5, 8, 3, HQ, D)
OFFSETS = i32(*CU_Q), i32(*CU_K)
# Each form: the function, its arrays, and the call with separate arrays.
FORMS = {
    "qkvpacked": (
        flash_attn_qkvpacked_func,
        [QKV],
        lambda qkv, **options: flash_attn_func(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], **options),
    ),
    "kvpacked": (
        flash_attn_kvpacked_func,
        [Q, KV],
        lambda q, kv, **options: flash_attn_func(q, kv[:, :, 0], kv[:, :, 1], **options),
    ),
    "varlen qkvpacked": (
        lambda qkv, **options: flash_attn_varlen_qkvpacked_func(qkv, OFFSETS[0], 5, **options),
        [PACKED_QKV],
        lambda qkv, **options: flash_attn_varlen_func(
            qkv[:, 0], qkv[:, 1], qkv[:, 2], OFFSETS[0], OFFSETS[0], 5, 5, **options
        ),
    ),
    "varlen kvpacked": (
        lambda q, kv, **options: flash_attn_varlen_kvpacked_func(q, kv, *OFFSETS, 5, 5, **options),
        [PACKED_Q, PACKED_KV],
        lambda q, kv, **options: flash_attn_varlen_func(q, kv[:, 0], kv[:, 1], *OFFSETS, 5, 5, **options),
    ),
}
forms = pytest.mark.parametrize("form", FORMS)


@forms
@pytest.mark.parametrize("name", OPTIONS)
def test_each_form_is_the_call_with_the_parts_apart(form, name, implementation):
    packed, arrays, apart = FORMS[form]
    options = OPTIONS[name] | {"implementation": implementation, "return_attn_probs": True}
    jax.tree.map(np.testing.assert_array_equal, packed(*arrays, **options), apart(*arrays, **options))


@forms
def test_gradients_are_packed_alike(form, implementation):
    packed, arrays, apart = FORMS[form]

    def gradients(function):
        def loss(*arrays):
            return jnp.sin(function(*arrays, causal=True, implementation=implementation)).sum()

        return jax.grad(loss, tuple(range(len(arrays))))(*arrays)

    for got, wanted, x in zip(gradients(packed), gradients(apart), arrays):
        assert got.shape == x.shape
        np.testing.assert_array_equal(got, wanted)


@forms
def test_dropout_is_passed_on(form):
    packed, arrays, apart = FORMS[form]
    options = dict(dropout_p=0.5, dropout_key=jax.random.key(1))
    np.testing.assert_array_equal(packed(*arrays, **options), apart(*arrays, **options))


ERRORS = {
    "qkv rank": (
        lambda: flash_attn_qkvpacked_func(PACKED_QKV),
        "flash_attn_qkvpacked_func: qkv must have rank 5 [b s 3 h d], got shape (8, 3, 4, 16)",
    ),
    "kv parts": (
        lambda: flash_attn_kvpacked_func(Q, QKV),
        "flash_attn_kvpacked_func: kv must have shape [b, sk, 2, hk, d], got (3, 7, 3, 4, 16)",
    ),
    "packed qkv parts": (
        lambda: flash_attn_varlen_qkvpacked_func(PACKED_KV, OFFSETS[0], 5),
        "flash_attn_varlen_qkvpacked_func: qkv must have shape [t, 3, h, d], got (12, 2, 2, 16)",
    ),
    "packed kv rank": (
        lambda: flash_attn_varlen_kvpacked_func(PACKED_Q, KV, *OFFSETS, 5, 5),
        "flash_attn_varlen_kvpacked_func: kv must have rank 4 [tk 2 hk d], got shape (3, 9, 2, 2, 16)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_packed_array(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        call()
