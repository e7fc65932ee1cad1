"""float64 and int64, which JAX has in x64 mode: what is refused, and what is read as 32 bits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import ShapeDtypeStruct as Array
from test_errors import FIXED, PACKED, SK, SQ, floats, trace

import jax_flash


def test_float64_is_refused_except_in_plain_jax():
    wide = {name: floats(*x.shape, dtype="float64") for name, x in FIXED.items()}
    with jax.enable_x64(True):
        message = 'query has dtype float64, allowed are float16, bfloat16, float32; implementation="xla" takes float64'
        with pytest.raises(TypeError, match=re.escape(message)):
            trace(jax_flash.flash_attention, wide)
        assert trace(jax_flash.flash_attention, wide | {"implementation": "xla"}).dtype == jnp.float64


def test_a_bias_of_the_host_is_float32_in_x64_mode():
    with jax.enable_x64(True):
        for bias in (0.5, np.zeros((SQ, SK))):
            assert trace(jax_flash.flash_attention, FIXED | {"bias": bias}).dtype == jnp.float32
        with pytest.raises(TypeError, match=r"got float64; cast it with .astype\('float32'\)"):
            trace(jax_flash.flash_attention, FIXED | {"bias": Array((SQ, SK), jnp.float64)})


def test_int64_index_arrays_are_refused_in_x64_mode():
    with jax.enable_x64(True), pytest.raises(TypeError, match="cu_seqlens_q must be int32, got int64"):
        trace(jax_flash.flash_attention_varlen, PACKED | {"cu_seqlens_q": Array((3,), jnp.int64)})
