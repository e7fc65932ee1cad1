"""The host's time of a small call: how long launching it keeps the CPU busy, for this library and its peers."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from . import cases, measure, peers
from .bars import Cell
from .cases import Case

NAMES = ("jax_flash", "cudnn", "flash-attn3-jax", "dew-flash-attn")
CHAIN = 30  # calls in one program
WARM, LAUNCHED, REPEATS, ATTEMPTS = 3, 8, 9, 5
BUSY = 0.04  # seconds of other work on the device: longer than the host takes to launch its programs
REST = 0.002  # seconds; once the host has been idle for as long, all programs have been launched
NO_GRAPHS = {"xla_gpu_graph_min_graph_size": 1 << 20}


def calls_of(case: Case, names: tuple[str, ...], **compiler_options: Any) -> tuple[measure.Calls, Any]:
    """Programs of CHAIN calls, by implementation, and the reasons of those that do not run."""
    inputs = peers.draw_inputs(case)[:1]

    def compile_one(name: str) -> peers.Finish:
        call, (arguments,) = peers.calls(name, case, "forward", inputs)
        program = measure.chained(call, CHAIN, **compiler_options)
        program.lower(*arguments).compile()
        return lambda: (program, [arguments])

    return peers.compiled_side_by_side({name: functools.partial(compile_one, name) for name in names})


def host_cells() -> Iterator[Cell]:
    """The host's time of a call that is launched by itself, and of one in a command buffer."""
    busy = _busy()
    for how, options in (("launched one by one", NO_GRAPHS), ("in command buffers", {})):
        calls, times = calls_of(cases.small_case(128, 512, False), NAMES, **options)
        for name, t in _measure(calls, busy).items():
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
    """name → the seconds of one call in each repeat; the implementations alternate."""
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
    """Launches programs while the device has other work, so that the host never waits for the device.

    Returns seconds of one call: "host" is the CPU time of all threads until they rest, "issue" the time until the
    calls of the programs have returned.
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


SECTIONS: dict[str, Callable[[], Iterator[Cell]]] = {"host": host_cells}
