"""Ragged paged attention of JAX's Pallas kernels for TPUs: its tests, with our adapter in place of its kernel.

These tests are only in JAX's repository. Calls in float32 are also compared with JAX's reference, to 5e-5.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from jax._src import test_util
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as own

from jax_flash.compat.ragged_paged_attention import ragged_paged_attention

from .common import Comparison, Library
from .tpu_inference import SCORES, beside_own

EXPECTED: dict[str, str] = {}


def main() -> int:
    comparison = Comparison(SCORES)
    own.ragged_paged_attention, own.ref_ragged_paged_attention = beside_own(
        comparison, ragged_paged_attention, own.ref_ragged_paged_attention
    )
    test_util.is_device_tpu_at_least = lambda version: True  # else the tests skip
    library = Library("ragged_paged_attention", "jax", EXPECTED)
    tests = Path(os.environ["LIBRARY_CHECKOUT"]) / "tests" / "pallas"
    library.pytest(tests / "tpu_ragged_paged_attention_test.py", options=["--noconftest"])
    return library.report(comparison)


if __name__ == "__main__":
    sys.exit(main())
