"""What memory gives: a streaming read by as many threads as there are cores."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

WORD = 4
LINE = 64


def reader() -> Callable[..., None]:
    """A function that reads all bytes of some arrays once, compiled here for this machine."""
    read = _compiled().stream_read
    read.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    threads = len(os.sched_getaffinity(0))
    pool = ThreadPoolExecutor(threads)

    def run(*arrays: Any) -> None:
        shares = [_shares(array, threads) for array in arrays]
        list(pool.map(lambda own: [read(*share) for share in own], zip(*shares, strict=True)))

    return run


def _compiled() -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise RuntimeError("benchmarks: a C++ compiler is needed for the streaming read; name one with CXX")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "stream.so"
        source = Path(__file__).with_name("stream.cc")
        flags = ["-O3", "-march=native", "-mprefer-vector-width=512", "-funroll-loops", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))


def _shares(array: Any, count: int) -> list[tuple[int, int]]:
    """(address, words) of each thread's part."""
    host = np.asarray(array)  # of a CPU device: no copy
    size = -(-host.nbytes // (count * LINE)) * LINE
    starts = range(0, count * size, size)
    return [(host.ctypes.data + at, max(0, min(size, host.nbytes - at)) // WORD) for at in starts]
