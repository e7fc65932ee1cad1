"""Lets tests import benchmarks/. Without the benchmarks, a test file that imports this one is skipped."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks").exists():
    pytest.skip("only the tests are here, not the benchmarks", allow_module_level=True)
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))
