"""Timing: medians of drained repeats, inputs that do not stay in cache, and what the device itself can do."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Call = Callable[..., Any]

# Inputs are rotated through this many bytes: several times the largest L2 or L3 in use today.
ROTATION = {"gpu": 512 << 20, "cpu": 256 << 20}


def copies_for(arguments: Any, platform: str) -> int:
    """How many copies of the arguments fill the rotation."""
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments))
    return max(1, min(64, -(-ROTATION[platform] // max(size, 1))))


def interleaved(
    calls: dict[str, tuple[Call, Sequence[tuple[Any, ...]]]],
    repeats: int,
    seconds: float,
    pause: float = 0.0,
    settle: float = 0.0,
    most: int = 200,
) -> dict[str, list[float]]:
    """Seconds per call of each, repeat by repeat.

    All calls take turns within a repeat, so that they meet the device in the same state (power, heat).
    A repeat is as many calls back to back as fill `seconds`; the device is drained before and after it.

    Args:
      calls: name → (function, the argument tuples it goes through in turn).
      pause: seconds of rest before a repeat, in which the threads of the call before it stop spinning.
      settle: seconds of untimed calls after the rest, one at least: what the call before it left behind is
        not theirs to pay, such as memory that it freed and the host took back.
      most: calls of a repeat, however short they are.
    """
    counts, untimed, rotations = {}, {}, {}
    for name, (call, arguments) in calls.items():
        rotations[name] = itertools.cycle(arguments)
        jax.block_until_ready(call(*next(rotations[name])))
        counts[name] = fill(call, rotations[name], seconds, most)
        untimed[name] = fill(call, rotations[name], settle, most)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, (call, _) in calls.items():
            time.sleep(pause)
            if settle > 0:
                _repeat(call, rotations[name], untimed[name])
            times[name].append(_repeat(call, rotations[name], counts[name]))
    return times


def fill(call: Call, arguments: Iterator[Any], seconds: float, most: int) -> int:
    """How many calls back to back fill `seconds`.

    Found by repeats that grow: a call by itself takes the host's time besides, and the first ones that of
    making a graph of it. Where repeats last alike, what each costs beside its calls weighs alike, too.
    """
    count, fitting = 0, 1
    while seconds > 0 and fitting > 1.1 * count:
        count = fitting
        fitting = max(1, min(most, int(seconds / _repeat(call, arguments, count))))
    return fitting


def _repeat(call: Call, arguments: Any, count: int) -> float:
    prepared = [next(arguments) for _ in range(count)]
    one_at_a_time = (
        jax.default_backend() == "cpu"
    )  # the CPU client may overlap calls, a GPU stream never does
    start = time.perf_counter()
    for argument in prepared:
        out = call(*argument)
        if one_at_a_time:
            jax.block_until_ready(out)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / count


def chained(call: Call, count: int, **compiler_options: Any) -> Call:
    """`count` calls in one program, each fed by the one before: launching one may take longer than it runs."""

    def chain(query: Any, *others: Any) -> Any:
        for _ in range(count):
            query = call(query, *others)
        return query

    return jax.jit(chain, compiler_options=compiler_options or None)


def median(times: Sequence[float]) -> float:
    return statistics.median(times)


def spread(times: Sequence[float]) -> float:
    """Half the distance between the quartiles, relative to the median."""
    if len(times) < 4:
        return (max(times) - min(times)) / 2 / median(times)
    low, _, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / median(times)


def summary(times: Sequence[float]) -> dict[str, Any]:
    """Of one call's times, as cells keep them."""
    return {"median": median(times), "spread": spread(times), "times": times}


def matmul_call(platform: str, dtype: str) -> tuple[Call, list[tuple[Any, ...]], float]:
    """A square product in `dtype` at the device's own pace: the call, its arguments, its FLOP."""
    n = 8192 if platform == "gpu" else 2048
    a, b = (jax.random.normal(key, (n, n), dtype) for key in jax.random.split(jax.random.key(0)))
    return jax.jit(jnp.matmul), [(a, b)], 2.0 * n**3


def copy_call(platform: str) -> tuple[Call, list[tuple[Any, ...]], float]:
    """A copy larger than any cache: the call, its arguments, the bytes it reads and writes."""
    size = (2 << 30) if platform == "gpu" else (256 << 20)
    x = jnp.zeros(size // 4, jnp.float32)
    return jax.jit(lambda x: x + 1), [(x,)], 2.0 * size
