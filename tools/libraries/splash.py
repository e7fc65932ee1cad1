"""Splash attention of JAX: its tests, with the kernels and masks of `jax_flash.compat.splash` in place of its own.

The tests exist only in JAX's repository.
"""

from __future__ import annotations

import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from jax_flash.compat import splash

from .common import Library

EXPECTED: dict[str, str] = {}
MASKS = (
    "CausalMask",
    "ChunkedCausalMask",
    "FullMask",
    "LocalMask",
    "LogicalAnd",
    "LogicalOr",
    "MultiHeadMask",
)
MASK_FUNCTIONS = (
    "NumpyMask",
    "make_causal_mask",
    "make_chunk_attention_mask",
    "make_local_attention_mask",
    "make_random_mask",
)


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


def main() -> int:
    for name in (*MASKS, *MASK_FUNCTIONS):
        setattr(splash_attention_mask, name, getattr(splash, name))
    for name in ("make_splash_mha_single_device", "make_splash_mqa_single_device"):
        setattr(splash_attention_kernel, name, getattr(splash, name))

    from_checkout("jax._src.hypothesis_test_util")
    pallas_test_util = from_checkout("jax._src.pallas.pallas_test_util")
    pallas_test_util.PallasTest.INTERPRET = True  # else the tests skip without a TPU
    library = Library("splash", "jax", EXPECTED)
    tests = Path(os.environ["LIBRARY_CHECKOUT"]) / "tests" / "pallas"
    masks = f"{tests / 'tpu_splash_attention_mask_test.py'}::SplashAttentionMaskTest"
    kernels = tests / "tpu_splash_attention_kernel_test.py"
    # The tests of custom_bwd call nothing but JAX's own kernel.
    library.pytest(masks, kernels, options=["--noconftest", "-k", "not custom_bwd"])
    return library.report()


if __name__ == "__main__":
    sys.exit(main())
