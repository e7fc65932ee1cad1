"""Machines with a GPU: one without a CUDA library, and one whose library is for another CUDA version than its jax."""

import importlib.util
import subprocess
import sys

import pytest

from jax_flash.backends import local_devices

needs_gpu = pytest.mark.skipif(not local_devices("cuda"), reason="needs a GPU")

# Runs before jax_flash is imported, because the import registers libraries. Hides a library inside the package.
CALL = """
import importlib.util, jax, jax.numpy as jnp, sys
from pathlib import Path
find, exists = importlib.util.find_spec, Path.exists
importlib.util.find_spec = lambda name, *rest: find({wheel!r} if name.startswith("jax_flash_cuda") else name, *rest)
Path.exists = lambda path, **rest: path.name != "libjax_flash_cuda.so" and exists(path, **rest)
import jax_flash
backends = sys.modules["jax_flash.backends"]
x = jax.random.normal(jax.random.key(0), (2, 300, 4, 64))

def gradients(implementation):
    def loss(q, k, v):
        return (jax_flash.flash_attention(q, k, v, causal=True, implementation=implementation) ** 2).sum()
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, 2 * x, x + 1)
"""


def run(wheel: str, program: str) -> str:
    """The output of a separate process, which finds `wheel` when it looks for the library of its jax's CUDA."""
    text = CALL.format(wheel=wheel) + program
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_gpu
def test_a_gpu_without_a_library_is_told_what_to_install_and_runs_plain_jax():
    program = """
for implementation in ("cuda", None):
    try:
        gradients(implementation)
        print("ran")
    except NotImplementedError as error:
        print(error)
print([bool(jnp.isfinite(g).all()) for g in gradients("xla")])
"""
    *errors, plain = run("no_such_wheel", program).splitlines()
    assert len(errors) == 2
    for error in errors:
        assert 'implementation "cuda" is not installed: in a clone of the repository' in error
        assert 'pip install "jax-flash[cuda' in error
        assert '"xla" runs here' in error
    assert plain == "[True, True, True]"


@needs_gpu
@pytest.mark.skipif(importlib.util.find_spec("jax_flash_cuda12") is None, reason="needs jax-flash-cuda12")
def test_the_library_for_cuda_12_runs_beside_the_plugin_for_cuda_13():
    program = """
print(backends.cuda_library().path.parent.name)
for ours, plain in zip(gradients("cuda"), gradients("xla")):
    print(float(jnp.abs(ours - plain).max() / jnp.abs(plain).max()))
"""
    name, *differences = run("jax_flash_cuda12", program).splitlines()
    assert name == "jax_flash_cuda12"
    assert all(float(x) < 1e-4 for x in differences)
