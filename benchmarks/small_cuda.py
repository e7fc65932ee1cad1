"""Small problems: the device's time of a call, and the host's, beside cuDNN's."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

import jax_flash

from . import measure
from .bars import Cell

CHAIN = 30  # calls in one program
SIZES = tuple((d, s, causal) for d in (64, 128) for s in (512, 1024) for causal in (False, True))
HEADS, WARM, LAUNCHED, REPEATS, ATTEMPTS = 16, 3, 8, 9, 5
BUSY = 0.04  # seconds of other work on the device: longer than the host is given here
REST = 0.002  # seconds, in which the host does nothing more: all programs are launched
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
    """The device's time."""
    busy = _busy()
    for d, s, causal in SIZES:
        measured = _measure(_calls(d, s, causal), busy)
        times = {name: measure.summary([m["device"] for m in t]) for name, t in measured.items()}
        name = f"b1 h{HEADS} d{d} s{s}{' causal' if causal else ''}"
        yield {"kind": "small", "name": name, "d": d, "s": s, "causal": causal, "times": times}


def host_cells() -> Iterator[Cell]:
    """What a call adds to the host's work, launched by itself and as a part of a command buffer."""
    busy = _busy()
    for how, options in (("launched one by one", NO_GRAPHS), ("in command buffers", {})):
        times: dict[str, Any] = {}
        for name, t in _measure(_calls(128, 512, False, **options), busy).items():
            times[name] = measure.summary([m["host"] for m in t])
            times[name]["issue"] = measure.median([m["issue"] for m in t])
        yield {"kind": "host", "name": f"host time, {how}", "times": times}


def _busy() -> Callable[[], Any]:
    """A program of products that keeps the device from others for BUSY seconds."""
    product, operands, _ = measure.matmul_call("gpu", "bfloat16")
    count = measure.fill(product, itertools.cycle(operands), BUSY, 1000)
    products = measure.chained(lambda a, b: a @ b * len(b) ** -0.5, count)
    jax.block_until_ready(products(*operands[0]))
    return lambda: products(*operands[0])


def _measure(calls: dict[str, Any], busy: Callable[[], Any]) -> dict[str, list[dict[str, float]]]:
    """name → what each repeat took, seconds of one call; in turns."""
    for call, arguments in calls.values():
        for _ in range(WARM):
            jax.block_until_ready(call(*arguments[0]))
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, (call, arguments) in calls.items():
            measured[name].append(_behind(busy, call, arguments[0]))
    return measured


def _behind(busy: Callable[[], Any], call: Any, arguments: Any) -> dict[str, float]:
    """Programs launched while the device has other work, so that host and device do not wait for each other.

    Returns seconds of one call: "host" of all threads of the process until they rest, "issue" until the
    programs' calls have returned, "device" from the end of the other work.
    """
    for _ in range(ATTEMPTS):
        other = busy()
        time.sleep(REST)
        idle, start = time.process_time(), time.perf_counter()
        outs = [call(*arguments) for _ in range(LAUNCHED)]
        issue, host, before = time.perf_counter() - start, time.process_time() - idle, 0.0
        while host - before > REST / 10 and not other.is_ready():
            time.sleep(REST)
            host, before = time.process_time() - idle, host
        launched = not other.is_ready()
        jax.block_until_ready(other)
        start = time.perf_counter()
        jax.block_until_ready(outs)
        device = time.perf_counter() - start
        if launched:
            seconds = {"host": host, "issue": issue, "device": device}
            return {name: t / LAUNCHED / CHAIN for name, t in seconds.items()}
    raise RuntimeError(f"the device was done with {BUSY} s of other work while programs were launched")


def share(cell: Cell) -> float:
    """cuDNN's time over ours."""
    return float(cell["times"]["cudnn"]["median"] / cell["times"]["jax_flash"]["median"])


def verdict(cell: Cell) -> str:
    shown = (f"{name} {t['median'] * 1e6:.1f}" for name, t in cell["times"].items())
    return f"microseconds: {', '.join(shown)}; × cudnn {share(cell):.2f}"
