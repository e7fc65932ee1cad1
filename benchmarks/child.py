"""A child process that is bound to some cores, to measure scaling over threads and memory."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cases import Case

# Seconds of calls before and during the timing. The untimed ones are needed because the process slept while
# another process was measured.
SETTLE, BURST = 0.05, 0.2


class Child:
    """`with Child(cores=1) as child: child.call(case, pass_)()` gives the seconds of a call in the child."""

    def __init__(self, cores: int):
        # XLA sizes its thread pool when it is loaded, so the child must load it itself.
        context = multiprocessing.get_context("spawn")
        self._pipe, other_end = context.Pipe()
        allowed = sorted(os.sched_getaffinity(0))[:cores]
        self._process = context.Process(target=_serve, args=(other_end, allowed), daemon=True)

    def __enter__(self) -> Child:
        self._process.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pipe.send(None)
        self._process.join()

    def call(self, case: Case, pass_: str) -> Callable[[], float]:
        """Prepares the call in the child. The result is a function that runs one burst and returns a call's mean
        seconds."""
        self._ask("prepare", case, pass_)
        return lambda: self._ask("burst", case, pass_)

    def growth(self, case: Case) -> int:
        """How much the process's memory grows at its peak, in bytes, while it computes forward and backward once."""
        return int(self._ask("growth", case, "both"))

    def _ask(self, *request: Any) -> Any:
        self._pipe.send(request)
        answer = self._pipe.recv()
        if isinstance(answer, str):
            raise RuntimeError(f"benchmarks: {answer}")
        return answer


def _serve(pipe: Any, cores: list[int]) -> None:
    os.sched_setaffinity(0, cores)
    calls: dict[Any, Any] = {}
    while (request := pipe.recv()) is not None:
        try:
            pipe.send(_answer(calls, *request))
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")


def _answer(calls: dict[Any, Any], what: str, case: Case, pass_: str) -> Any:
    import jax

    from . import measure, peers
    from .cases import make_inputs

    if what == "growth":
        call, arguments = peers.calls("jax_flash", case, pass_, [make_inputs(case)])
        return _growth(call.lower(*arguments[0]).compile(), arguments[0])
    key = (case.name, case.hq, pass_)
    if what == "prepare":
        call, arguments = peers.calls("jax_flash", case, pass_, [make_inputs(case)])
        jax.block_until_ready(call(*arguments[0]))
        calls[key] = call, arguments
        return True
    return measure.interleaved({"": calls[key]}, 1, BURST, settle=SETTLE)[""][0]


def _growth(compiled: Any, arguments: Any) -> int:
    import jax

    jax.block_until_ready(arguments)
    ctypes.CDLL(None).malloc_trim(0)  # memory that the allocator keeps would hide growth
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    out = jax.block_until_ready(compiled(*arguments))
    return _status("VmHWM") - before - sum(x.nbytes for x in jax.tree.leaves(out))


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"benchmarks: /proc/self/status has no {name}")
