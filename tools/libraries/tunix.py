"""tunix: its models with `use_flash_attention`, with our adapter in the place of JAX's Splash attention.

Its tests replace the kernel by one that returns the queries; where a clone is given, they are run with ours instead.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.sharding import Mesh

from jax_flash.compat import tunix

from .common import Library, bare

EXPECTED: dict[str, str] = {}
bare("tunix")  # whose own __init__ imports trainers


@contextmanager
def ours(module: Any) -> Any:
    """Our adapter in a module of tunix, on a mesh of one device."""
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    with mock.patch.object(module, "splash", tunix), mesh:
        yield


def main() -> int:
    library = Library("tunix", "google-tunix", EXPECTED)
    library.our_tests("test_compat_tunix.py::test_it_is_tunix_s_own")
    if "LIBRARY_CHECKOUT" in os.environ:
        path = Path(os.environ["LIBRARY_CHECKOUT"]) / "tests" / "models" / "flash_attention_cache_test.py"
        library.pytest(path, options=["-p", __name__, "--noconftest", "--import-mode=importlib"])
    return library.report()


def pytest_collection_modifyitems(items: Any) -> None:
    for item in items:
        if hasattr(item.module, "_patch_flash_attention"):
            item.module._patch_flash_attention = ours


if __name__ == "__main__":
    sys.exit(main())
