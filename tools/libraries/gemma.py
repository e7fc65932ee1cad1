"""gemma: its layers compared with our patched ones; with a clone, also its modules' tests on patched ones."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path

from jax_flash.compat import gemma

from .common import Library

EXPECTED: dict[str, str] = {}
MODULES = [import_module(f"gemma.gm.nn{package}._modules") for package in ("", ".gemma3n", ".gemma4")]
TESTS = ("_modules_test.py", "gemma3n/_modules_test.py")


def main() -> int:
    library = Library("gemma", "gemma", EXPECTED)
    library.our_tests(
        "test_compat_gemma.py::test_it_is_gemma_s_own"
    )  # that test patches its own copies of the classes
    if "LIBRARY_CHECKOUT" in os.environ:
        gemma.patch(*(module.Attention for module in MODULES))
        folder = Path(os.environ["LIBRARY_CHECKOUT"]) / "gemma" / "gm" / "nn"
        library.pytest(
            *(folder / test for test in TESTS), options=["--noconftest", "--import-mode=importlib"]
        )
    return library.report()


if __name__ == "__main__":
    sys.exit(main())
