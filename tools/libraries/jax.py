"""JAX's Pallas kernels but Splash and ragged paged attention: their tests, with our adapters in place of the kernels.

These tests are only in JAX's repository.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from jax._src import test_util
from jax.experimental.pallas.ops.gpu import attention as gpu_attention
from jax.experimental.pallas.ops.gpu import paged_attention as gpu_paged_attention
from jax.experimental.pallas.ops.tpu import paged_attention as tpu_paged_attention

from jax_flash.compat import pallas_gpu, pallas_tpu

from .common import Library

EXPECTED = {"*test_return_residuals_not_differentiable": "residuals, which have gradients here"}


def main() -> int:
    gpu_attention.mha = pallas_gpu.mha
    gpu_paged_attention.paged_attention = pallas_gpu.paged_attention
    tpu_paged_attention.paged_attention = pallas_tpu.paged_attention
    # Else the tests of TPUs skip; those of generation 6 have no quantised pages.
    test_util.is_device_tpu_at_least = lambda version: version < 6
    library = Library("pallas", "jax", EXPECTED)
    tests = Path(os.environ["LIBRARY_CHECKOUT"]) / "tests" / "pallas"
    library.pytest(
        tests / "tpu_paged_attention_kernel_test.py",
        f"{tests / 'gpu_paged_attention_test.py'}::PagedAttentionInterpretTest",
        f"{tests / 'gpu_ops_test.py'}::FusedAttentionInterpretTest",
        options=["--noconftest"],
    )
    return library.report()


if __name__ == "__main__":
    sys.exit(main())
