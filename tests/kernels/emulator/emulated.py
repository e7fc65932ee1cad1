"""A pytest plugin: calls for the CPU run the CUDA kernels on tests/kernels/emulator instead of the CPU kernels.

python tools/cuda_library.py --emulated      builds the library
PYTHONPATH=.:tools:tests/kernels/emulator python -m pytest -p emulated tests/test_paged.py
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any
from unittest import mock

import cuda_library
import jax
from jax.interpreters import mlir

# Must come before the import, which would register the CPU kernels under the names that the emulator's kernels take.
with mock.patch("jax.ffi.register_ffi_target"):
    from jax_flash import primitives


def pytest_configure() -> None:
    _register()
    primitives.require_cuda = lambda operation: None
    lower = partial(_lower, primitives._lower_local)
    primitives._lower_local = lower
    for pass_, primitive in primitives.LOCAL.items():
        mlir.register_lowering(primitive, partial(lower, pass_=pass_, platform="cpu"), platform="cpu")


def _lower(original: Any, ctx: Any, *values: Any, pass_: Any, spec: Any, platform: str) -> Any:
    assert platform == "cpu"
    spec = dataclasses.replace(spec, implementation=None)
    return original(ctx, *values, pass_=pass_, spec=spec, platform="cuda")


def _register() -> None:
    library = cuda_library.open_library(cuda_library.EMULATED)
    for pass_, symbol in cuda_library.HANDLERS.items():
        jax.ffi.register_ffi_target(
            f"jax_flash_{pass_}", jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu"
        )
