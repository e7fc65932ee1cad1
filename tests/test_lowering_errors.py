"""Errors after tracing: where there is no library, and what the chosen one lacks."""

import re

import jax
import jax.numpy as jnp
import pytest

import jax_flash

# No library, or another platform's.

X = jnp.ones((1, 3, 2, 8), jnp.float16)


def lower(platform, **options):
    call = jax.jit(lambda x: jax_flash.flash_attention(x, x, x, **options))
    return call.trace(X).lower(lowering_platforms=(platform,))


def test_a_platform_without_custom_call_raises_and_names_plain_jax():
    message = re.escape(
        'jax_flash has no custom call for platform "tpu"; use implementation="xla", plain JAX'
    )
    with pytest.raises(NotImplementedError, match=message):
        lower("tpu")
    lower("tpu", implementation="xla")
    with pytest.raises(NotImplementedError, match=message):
        jax.export.export(jax.jit(lambda x: jax_flash.flash_attention(x, x, x)), platforms=["cpu", "tpu"])(X)


@pytest.mark.parametrize(("asked", "platform"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_the_custom_call_of_another_platform_raises_and_names_those_that_run(asked, platform):
    message = f'implementation="{asked}" cannot run on platform "{platform}"'
    way_out = f'use implementation="{platform}", "xla", or None'
    with pytest.raises(NotImplementedError, match=re.escape(f"{message}; {way_out}")):
        lower(platform, implementation=asked)


def test_cuda_on_a_cpu_raises_when_called():
    cpu = jax.devices("cpu")[0]
    x = jax.device_put(X, cpu)
    with pytest.raises(NotImplementedError, match='implementation="cuda" cannot run on platform "cpu"'):
        jax_flash.flash_attention(x, x, x, implementation="cuda")


# On CUDA, what no kernel reads or was built for.


def test_head_dims_and_dtypes_that_were_not_built_raise_and_name_plain_jax(kernel):
    built = next(b for b in jax_flash.backends() if b.implementation == kernel)
    if "float32" in built.dtypes:
        pytest.skip(f"{kernel} has every dtype")
    x = X.astype(jnp.float32)
    with pytest.raises(
        NotImplementedError, match=r'no CUDA kernel was built for float32 .*implementation="xla"'
    ):
        jax_flash.flash_attention(x, x, x, implementation=kernel)
