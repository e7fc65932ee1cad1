"""Small problems: the device's time of a call, and the host's, beside cuDNN's."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax

import jax_flash

from . import cases, measure
from .bars import Cell, speedup
from .cases import Case
from .sections import time_calls

CHAIN = 30  # calls in one program
WARM, LAUNCHED, REPEATS, ATTEMPTS = 3, 8, 9, 5
BUSY = 0.04  # seconds of other work on the device: longer than the host takes to launch its programs
REST = 0.002  # seconds in which the host does nothing more: then all programs are launched
NO_GRAPHS = {"xla_gpu_graph_min_graph_size": 1 << 20}


def chain(package: ModuleType, case: Case, **compiler_options: Any) -> tuple[measure.Call, list[Any]]:
    """CHAIN calls of this library, or of the package that stands for it, in one program."""

    def call(q: Any, k: Any, v: Any) -> Any:
        return package.flash_attention(q, k, v, causal=case.causal)

    return measure.chained(call, CHAIN, **compiler_options), [_draw(case)]


def _draw(case: Case) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, (case.b, case.sq, case.hq, case.d), case.dtype) for key in keys)


def _calls(case: Case, **compiler_options: Any) -> measure.Calls:
    def cudnn(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, is_causal=case.causal, implementation="cudnn")

    return {
        "jax_flash": chain(jax_flash, case, **compiler_options),
        "cudnn": (measure.chained(cudnn, CHAIN, **compiler_options), [_draw(case)]),
    }


def small_cells() -> Iterator[Cell]:
    """The device's time."""
    for size in cases.SMALL:
        case = cases.small_case(*size)
        times = measure.of_one(time_calls(_calls(case)), CHAIN)
        tags = {"d": case.d, "s": case.sq, "causal": case.causal}
        yield {"kind": "small", "name": case.name, **tags, "times": times}


def host_cells() -> Iterator[Cell]:
    """What a call adds to the host's work, launched by itself and as a part of a command buffer."""
    busy = _busy()
    for how, options in (("launched one by one", NO_GRAPHS), ("in command buffers", {})):
        times: dict[str, Any] = {}
        for name, t in _measure(_calls(cases.small_case(128, 512, False), **options), busy).items():
            times[name] = measure.summary([m["host"] for m in t])
            times[name]["issue"] = measure.median([m["issue"] for m in t])
        yield {"kind": "host", "name": f"host time, {how}", "times": times}


def _busy() -> Callable[[], Any]:
    """A program of products that keeps the device busy for BUSY seconds."""
    product, operands = measure.matmul_call("gpu", "bfloat16")
    count = measure.fill(product, itertools.cycle(operands), BUSY, 1000)
    products = measure.chained(lambda a, b: a @ b * len(b) ** -0.5, count)
    jax.block_until_ready(products(*operands[0]))
    return lambda: products(*operands[0])


def _measure(calls: measure.Calls, busy: Callable[[], Any]) -> dict[str, list[dict[str, float]]]:
    """name → what each repeat took, seconds of one call; in turns."""
    for call, arguments in calls.values():
        for _ in range(WARM):
            jax.block_until_ready(call(*arguments[0]))
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    for repeat in range(REPEATS):
        for name in measure.order(list(calls), repeat):
            call, arguments = calls[name]
            measured[name].append(_host_time(busy, call, arguments[0]))
    return measured


def _host_time(busy: Callable[[], Any], call: Any, arguments: Any) -> dict[str, float]:
    """Programs launched while the device has other work, so that the host never waits for the device.

    Returns seconds of one call: "host": of all threads of the process until they rest; "issue": until the programs'
    calls have returned.
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
        jax.block_until_ready(outs)
        if launched:
            return {name: t / LAUNCHED / CHAIN for name, t in (("host", host), ("issue", issue))}
    raise RuntimeError(f"the device was done with {BUSY} s of other work while programs were launched")


def verdict(cell: Cell) -> str:
    shown = (f"{name} {t['median'] * 1e6:.1f}" for name, t in cell["times"].items())
    return f"microseconds: {', '.join(shown)}; × cudnn {speedup(cell, 'cudnn'):.2f}"
