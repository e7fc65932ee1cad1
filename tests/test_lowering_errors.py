"""Errors after tracing: where there is no library, what the chosen one lacks, and derivatives that it has not."""

import re

import jax
import jax.numpy as jnp
import numpy as np
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


# Derivatives: reverse mode, once.


def loss(implementation):
    return lambda x: (
        jax_flash.flash_attention(x, x, x, implementation=implementation).astype(jnp.float32).sum()
    )


@pytest.mark.parametrize(
    "derive", [lambda f: jax.jvp(f, (X,), (X,)), lambda f: jax.jacfwd(f)(X)], ids=["jvp", "jacfwd"]
)
def test_forward_mode_raises_and_says_so(derive, kernel):
    with pytest.raises(TypeError, match=r"forward-mode .*\(jvp\).* custom_vjp"):
        derive(loss(kernel))


def test_second_derivatives_raise_and_name_plain_jax(kernel):
    message = r'differentiable in reverse mode once; use implementation="xla" for forward mode and higher derivatives'
    with pytest.raises(NotImplementedError, match=message):
        jax.grad(lambda x: jax.grad(loss(kernel))(x).astype(jnp.float32).sum())(X)


def test_plain_jax_has_forward_mode_and_second_derivatives():
    x = X.astype(jnp.float32)
    _, tangent = jax.jvp(loss("xla"), (x,), (x,))
    assert np.isfinite(tangent)
    second = jax.grad(lambda x: jax.grad(loss("xla"))(x)[0, 0, 0, 0])(x)
    assert np.isfinite(second).all()
    assert second.any()


# On CUDA, what no kernel was built for.


def test_head_dims_and_dtypes_that_were_not_built_raise_and_name_plain_jax(kernel):
    built = next(b for b in jax_flash.backends() if b.implementation == kernel)
    if "float32" in built.dtypes:
        pytest.skip(f"{kernel} has every dtype")
    x = X.astype(jnp.float32)
    with pytest.raises(
        NotImplementedError, match=r'no CUDA kernel was built for float32 .*implementation="xla"'
    ):
        jax_flash.flash_attention(x, x, x, implementation=kernel)
