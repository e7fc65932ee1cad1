"""Warnings about copies and storage that an adapter needs because its library's arguments differ from this one's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..checker import Checker


class CostWarning(UserWarning):
    """The call is right, but it copies or stores more than the same call with this library's own arguments."""


def warn(check: Checker, what: str, instead: str) -> None:
    """Warns about a cost, and says how to avoid it. Python shows each text once."""
    warnings.warn(f"{check.op}: {what}; {instead}", CostWarning, stacklevel=2)


def size(shape: Sequence[Any], dtype: Any) -> str:
    """The memory of an array as text, like '4.0 MiB'; symbolic dimensions stay symbols."""
    try:
        count = float(np.prod([int(n) for n in shape]) * np.dtype(dtype).itemsize)
    except Exception:  # symbolic: JAX raises an error of its own
        return f"{np.dtype(dtype).name}[{', '.join(map(str, shape))}]"
    power = min(int(math.log2(max(count, 1)) // 10), 3)
    return f"{count / 1024**power:.4g} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"


def warn_dense(check: Checker, name: str, why: str, shape: Sequence[Any], instead: str) -> None:
    """Warns that a mask which is data of O(rows) elements becomes a boolean array of rows × keys."""
    warn(check, f"{name} becomes a dense boolean mask of {size(shape, np.bool_)}, since {why}", instead)
