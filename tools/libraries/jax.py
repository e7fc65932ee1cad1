"""JAX: the tests of jax.nn.dot_product_attention, Splash attention and other Pallas kernels, with ours in their place.

JAX's distribution has no tests, so they come from a checkout of its repository. ragged_paged_attention.py runs those of
ragged paged attention.
"""

from __future__ import annotations

import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import jax
from jax._src import test_util
from jax.experimental.pallas.ops.gpu import attention as gpu_attention
from jax.experimental.pallas.ops.gpu import paged_attention as gpu_paged_attention
from jax.experimental.pallas.ops.tpu import paged_attention as tpu_paged_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from jax_flash import dot_product_attention
from jax_flash.compat import pallas_gpu, pallas_tpu, splash

from .common import Library

EXPECTED = {"*test_return_residuals_not_differentiable": "residuals' gradients"}
MASKS = (
    "CausalMask",
    "ChunkedCausalMask",
    "FullMask",
    "LocalMask",
    "LogicalAnd",
    "LogicalOr",
    "MultiHeadMask",
    "NumpyMask",
    "make_causal_mask",
    "make_chunk_attention_mask",
    "make_local_attention_mask",
    "make_random_mask",
)
KERNELS = ("make_splash_mha_single_device", "make_splash_mqa_single_device")
_OWN = jax.nn.dot_product_attention


def from_checkout(name: str) -> Any:
    """A module of JAX's tests, which its distribution does not have."""
    spec = spec_from_file_location(
        name, Path(os.environ["LIBRARY_CHECKOUT"]) / f"{name.replace('.', '/')}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    parent, _, last = name.rpartition(".")
    setattr(sys.modules[parent], last, sys.modules[name])
    return sys.modules[name]


def beside_own(*arguments: Any, implementation: str | None = None, **named: Any) -> Any:
    """JAX's tests compare implementation="xla", which is ours here, with None, which stays JAX's own."""
    if implementation is None:
        return _OWN(*arguments, **named)
    return dot_product_attention(*arguments, **named)


def main() -> int:
    jax.nn.dot_product_attention = beside_own
    gpu_attention.mha = pallas_gpu.mha
    gpu_paged_attention.paged_attention = pallas_gpu.paged_attention
    tpu_paged_attention.paged_attention = pallas_tpu.paged_attention
    for name in MASKS:
        setattr(splash_attention_mask, name, getattr(splash, name))
    for name in KERNELS:
        setattr(splash_attention_kernel, name, getattr(splash, name))
    # Else the tests of TPUs skip; those of generation 6 have no quantised pages.
    test_util.is_device_tpu_at_least = lambda version: version < 6
    from_checkout("jax._src.hypothesis_test_util")
    from_checkout("jax._src.pallas.pallas_test_util").PallasTest.INTERPRET = True

    library = Library("jax", "jax", EXPECTED)
    tests = Path(os.environ["LIBRARY_CHECKOUT"]) / "tests"
    library.pytest(tests / "nn_test.py", options=["--noconftest", "-k", "DotProductAttention"])
    pallas = tests / "pallas"
    library.pytest(
        f"{pallas / 'tpu_splash_attention_mask_test.py'}::SplashAttentionMaskTest",
        pallas / "tpu_splash_attention_kernel_test.py",
        pallas / "tpu_paged_attention_kernel_test.py",
        f"{pallas / 'gpu_paged_attention_test.py'}::PagedAttentionInterpretTest",
        f"{pallas / 'gpu_ops_test.py'}::FusedAttentionInterpretTest",
        # The tests of custom_bwd call nothing but JAX's own kernel.
        options=["--noconftest", "-k", "not custom_bwd"],
    )
    return library.report()


if __name__ == "__main__":
    sys.exit(main())
