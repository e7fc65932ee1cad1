"""Equinox: its layer compared with ours; with a clone, also its layer's tests with our method."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import equinox
import equinox.internal
import jax
import pytest

from jax_flash.compat.equinox import multihead_attention

from .common import Library

EXPECTED: dict[str, str] = {}


@pytest.fixture
def getkey() -> Any:
    """As in their conftest.py, which cannot be loaded: it sets the number of devices that are already in use."""
    return equinox.internal.GetKey()


def main() -> int:
    library = Library("equinox", "equinox", EXPECTED)
    library.our_tests("test_compat_equinox.py::test_it_is_equinox_s_own")
    if "LIBRARY_CHECKOUT" in os.environ:
        equinox.nn.MultiheadAttention.__call__ = multihead_attention
        tests = Path(os.environ["LIBRARY_CHECKOUT"]) / "tests" / "test_nn.py"
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):  # theirs as well
            library.pytest(tests, options=["-p", __name__, "--noconftest", "-k", "multihead_attention"])
    return library.report()


if __name__ == "__main__":
    sys.exit(main())
