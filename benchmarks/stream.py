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
CHUNK = 4 << 20  # bytes that a thread takes at a time


def reader() -> Callable[..., None]:
    """A function that reads all bytes of some arrays once, compiled here for this machine."""
    read = _compiled().stream_read
    read.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))

    def run(*arrays: Any) -> None:
        list(pool.map(lambda chunk: read(*chunk), [c for array in arrays for c in _chunks(array)]))

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


def _chunks(array: Any) -> list[tuple[int, int]]:
    host = np.asarray(array)  # of a CPU device: no copy
    start, size = host.ctypes.data, host.nbytes
    return [(start + at, min(CHUNK, size - at) // WORD) for at in range(0, size, CHUNK)]
