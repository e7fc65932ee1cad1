"""`python -m benchmarks`: compares this library with its peers and with other commits of itself; see README.md."""

import sys
from pathlib import Path

# The tests' modules import each other by name.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
