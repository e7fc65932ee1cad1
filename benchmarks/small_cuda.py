"""Small problems: the device's time of a call, and the host's, beside cuDNN's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import jax

import jax_flash

from . import measure
from .bars import Cell
from .sections import time_calls

CHAIN = 30  # calls in one program
SIZES = tuple((d, s, causal) for d in (64, 128) for s in (512, 1024) for causal in (False, True))
HEADS, WARM, LAUNCHED, REPEATS = 16, 3, 4, 9
BUSY, DRAIN = (
    12,
    0.02,
)  # products of 8192³ that keep the device from ending a program, and seconds to launch all
NO_GRAPHS = {"xla_gpu_graph_min_graph_size": 1 << 20}


def _calls(d: int, s: int, causal: bool, **compiler_options: Any) -> dict[str, Any]:
    """name → (a program of CHAIN calls, [its arguments]); one batch entry of HEADS heads, bfloat16."""

    def cudnn(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")

    def ours(q: Any, k: Any, v: Any) -> Any:
        return jax_flash.flash_attention(q, k, v, causal=causal)

    keys = jax.random.split(jax.random.key(0), 3)
    arguments = tuple(jax.random.normal(key, (1, s, HEADS, d), "bfloat16") for key in keys)
    programs = {"jax_flash": ours, "cudnn": cudnn}
    return {n: (measure.chained(f, CHAIN, **compiler_options), [arguments]) for n, f in programs.items()}


def small_cells() -> Iterator[Cell]:
    """The device's time: programs of CHAIN calls back to back."""
    for d, s, causal in SIZES:
        times = time_calls(_calls(d, s, causal), 0.6)
        for t in times.values():
            t["median"] /= CHAIN
            t["times"] = [x / CHAIN for x in t["times"]]
        name = f"b1 h{HEADS} d{d} s{s}{' causal' if causal else ''}"
        yield {"kind": "small", "name": name, "d": d, "s": s, "causal": causal, "times": times}


def host_cells() -> Iterator[Cell]:
    """What a call adds to the host's work, launched by itself and as a part of a command buffer."""
    busy, operands, _ = measure.matmul_call("gpu", "bfloat16")
    for how, options in (("launched one by one", NO_GRAPHS), ("in command buffers", {})):
        times: dict[str, Any] = {}
        for name, (call, arguments) in _calls(128, 512, False, **options).items():
            for _ in range(WARM):
                jax.block_until_ready(call(*arguments[0]))
            measured = [_host_seconds(call, arguments[0], busy, operands[0]) for _ in range(REPEATS)]
            work, issue = ([x[i] for x in measured] for i in (0, 1))
            times[name] = {"median": measure.median(work), "spread": measure.spread(work), "times": work}
            times[name]["issue"] = measure.median(issue)
        yield {"kind": "host", "name": f"host time, {how}", "times": times}


def _host_seconds(call: Any, arguments: Any, busy: Any, operands: Any) -> tuple[float, float]:
    """Of one call: seconds of all threads of the process while the device has other work, and until the calls
    have returned."""
    for _ in range(BUSY):
        out = busy(*operands)
    time.sleep(DRAIN / 4)
    idle, start = time.process_time(), time.perf_counter()
    outs = [call(*arguments) for _ in range(LAUNCHED)]
    issue = time.perf_counter() - start
    time.sleep(max(0.0, DRAIN / 2 - issue))
    work = time.process_time() - idle
    jax.block_until_ready((out, outs))
    return work / LAUNCHED / CHAIN, issue / LAUNCHED / CHAIN


def share(cell: Cell) -> float:
    """cuDNN's time over ours."""
    return float(cell["times"]["cudnn"]["median"] / cell["times"]["jax_flash"]["median"])


def verdict(cell: Cell) -> str:
    shown = (f"{name} {t['median'] * 1e6:.1f}" for name, t in cell["times"].items())
    return f"microseconds: {', '.join(shown)}; × cudnn {share(cell):.2f}"
