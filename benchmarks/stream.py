"""A streaming read of memory by as many threads as there are cores."""

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

WORD = 4  # bytes


def reader() -> Callable[..., None]:
    """A function that reads all bytes of some arrays once, compiled here for this machine."""
    read = _compiled().stream_read
    read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    threads = len(os.sched_getaffinity(0))
    pool = ThreadPoolExecutor(threads)

    def run(*arrays: Any) -> None:
        hosts = [np.asarray(array) for array in arrays]  # on a CPU device this copies nothing
        counters = np.zeros(len(arrays) * 8, np.uint64)  # each counter has its own cache line
        shares = [
            (host.ctypes.data, host.nbytes // WORD, counters[8 * i :].ctypes.data)
            for i, host in enumerate(hosts)
        ]
        list(pool.map(lambda _: [read(*share) for share in shares], range(threads)))

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
