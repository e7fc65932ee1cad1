"""MaxDiffusion: its attention, and a layer that it trains, compared with ours. It is on no registry; its own tests look
into its TPU kernels."""

from __future__ import annotations

import os
import sys
import types

from .common import Library, bare

EXPECTED: dict[str, str] = {}
TESTS = "test_it_is_maxdiffusion_s_own", "test_a_layer_trains_as_with_maxdiffusion_s_own"


def main() -> int:
    sys.path.insert(0, f"{os.environ['LIBRARY_CHECKOUT']}/src")
    for package in ("maxdiffusion", "maxdiffusion.models"):  # their own __init__ imports PyTorch
        bare(package)
    # As do these modules, of which attention imports one function each, and calls neither here.
    for name, function in (("max_utils", "safe_getattr"), ("models.modeling_flax_utils", "get_activation")):
        module = types.ModuleType(f"maxdiffusion.{name}")
        setattr(module, function, None)
        sys.modules[module.__name__] = module
    library = Library("maxdiffusion", "", EXPECTED)
    library.our_tests(*(f"test_compat_maxdiffusion.py::{test}" for test in TESTS))
    return library.report()


if __name__ == "__main__":
    sys.exit(main())
