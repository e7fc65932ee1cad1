"""The function that times calls, and the calls that measure the device itself.

All implementations of a cell alternate in one process, in an order that changes between repeats. Each runs a burst of
n calls back to back that fill some 30 ms, right after n untimed calls of its own: a GPU is bound by power, and a
burst would otherwise pay for, or profit from, the calls before it (this changed cuDNN's rate by 8%). The device is
drained before and after each burst. Reports show the median of the repeats. Inputs are rotated through more bytes
than the largest cache holds.

The bursts of other implementations still affect the card's power: matrix products by one kernel were up to 10% faster
after slow kernels than after fast ones. If `settle` is `SETTLED` seconds of untimed calls, repeats agree to 1%, and
all rates are those of a card that has run at its power limit for long, some 6% lower.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from . import flop

Call = Callable[..., Any]
Calls = dict[str, tuple[Call, Sequence[tuple[Any, ...]]]]  # name → (function, argument tuples to go through)

ROTATION = {"gpu": 512 << 20, "cpu": 256 << 20}  # bytes: several times the largest L2 or L3 in use today
REPEATS, BURST = 6, 0.03  # seconds of a burst
SETTLED = 0.2  # seconds until an H200 bound by power runs at a call's own clock (1,980 → 1,650 MHz)
# Makes XLA use cuBLAS's fastest algorithm for products, even if the process runs with --xla_gpu_autotune_level=0.
PRODUCTS = {"xla_gpu_autotune_level": 4, "xla_gpu_enable_triton_gemm": False}
CALLS_AT_MOST = 200  # calls per burst


def copies_for(arguments: Any, platform: str) -> int:
    """How many copies of the arguments fill the rotation."""
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments))
    return max(1, min(64, -(-ROTATION[platform] // max(size, 1))))


def order(names: Sequence[str], repeat: int) -> list[str]:
    """The order of one repeat: rotated by one place after every two repeats, and reversed in every second repeat.

    Every implementation thus has every place, and runs before each other one as often as after it.
    """
    first = repeat // 2 % len(names) if names else 0
    rotated = [*names[first:], *names[:first]]
    return rotated[::-1] if repeat % 2 else rotated


def interleaved(
    calls: Calls,
    repeats: int,
    seconds: float,
    pause: float = 0.0,
    settle: float | None = None,
    most: int = CALLS_AT_MOST,
) -> dict[str, list[float]]:
    """Seconds per call of each implementation, repeat by repeat.

    Args:
      calls: name → (function, the argument tuples that it cycles through).
      repeats: the number of timed bursts of each.
      seconds: the length of a burst, which has at least one call.
      pause: seconds of rest before a burst, in which the threads of the CPU library called before stop spinning.
      settle: seconds of untimed calls before a burst, at least one call unless it is 0; None: as many as are timed.
      most: the largest number of calls in a burst.
    """
    counts, untimed, rotations = {}, {}, {}
    for name, (call, arguments) in calls.items():
        rotations[name] = itertools.cycle(arguments)
        jax.block_until_ready(call(*next(rotations[name])))
        counts[name] = fill(call, rotations[name], seconds, most)
        untimed[name] = counts[name] if settle is None else fill(call, rotations[name], settle, most)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats):
        for name in order(list(calls), repeat):
            time.sleep(pause)
            if settle != 0:
                burst(calls[name][0], rotations[name], untimed[name])
            times[name].append(burst(calls[name][0], rotations[name], counts[name]))
    return times


def in_turns(
    calls: Calls, repeats: int = REPEATS, seconds: float = BURST, settle: float | None = None
) -> dict[str, Any]:
    """Times calls as described at the head of this file; returns their summaries."""
    times = interleaved(calls, repeats, seconds, settle=settle)
    return {name: summary(each) for name, each in times.items()}


def fill(call: Call, arguments: Iterator[Any], seconds: float, most: int) -> int:
    """The number of calls back to back that fill `seconds`, found by growing bursts.

    One call alone includes the host's latency, and the first calls include making a CUDA graph of the program.
    """
    count, fitting = 0, 1
    while seconds > 0 and fitting > 1.1 * count:
        count = fitting
        fitting = max(1, min(most, int(seconds / burst(call, arguments, count))))
    return fitting


def burst(call: Call, arguments: Iterator[Any], count: int) -> float:
    """Mean seconds of `count` calls back to back; the device is idle before and after them."""
    prepared = [next(arguments) for _ in range(count)]
    one_by_one = jax.default_backend() == "cpu"  # the CPU client may overlap calls; a GPU's stream never does
    start = time.perf_counter()
    for argument in prepared:
        out = call(*argument)
        if one_by_one:
            jax.block_until_ready(out)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / count


def chained(call: Call, count: int, **compiler_options: Any) -> Call:
    """`count` calls in one program, each fed by the one before, because launching a call may take longer than it
    runs."""

    def chain(query: Any, *others: Any) -> Any:
        for _ in range(count):
            query = call(query, *others)
        return query

    return jax.jit(chain, compiler_options=compiler_options or None)


def of_one(times: dict[str, Any], count: int) -> dict[str, Any]:
    """Summaries of one call, from those of programs of `count` calls."""
    return {
        name: t | {"median": t["median"] / count, "times": [x / count for x in t["times"]]}
        for name, t in times.items()
    }


def plus_minus(times: dict[str, Any], digits: int = 1) -> str:
    """The largest spread of several summaries, as text."""
    return f"(± {100 * max(each['spread'] for each in times.values()):.{digits}f}%)"


def median(times: Sequence[float]) -> float:
    return statistics.median(times)


def spread(times: Sequence[float]) -> float:
    """Half the distance between the quartiles, relative to the median."""
    if len(times) < 4:
        return (max(times) - min(times)) / 2 / median(times)
    low, _, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / median(times)


def summary(times: Sequence[float]) -> dict[str, Any]:
    """The times of one implementation, in the form that cells keep."""
    return {"median": median(times), "spread": spread(times), "times": list(times)}


def matmul_call(platform: str, dtype: str) -> tuple[Call, list[tuple[Any, ...]]]:
    """A square matrix product in `dtype`."""
    n = flop.MATMUL_SIZE[platform]
    a, b = (jax.random.normal(key, (n, n), dtype) for key in jax.random.split(jax.random.key(0)))
    return jax.jit(jnp.matmul, compiler_options=PRODUCTS if platform == "gpu" else None), [(a, b)]


def copy_call() -> tuple[Call, list[tuple[Any, ...]], float]:
    """A copy larger than a GPU's caches: the call, its arguments, the bytes that it reads and writes."""
    size = 2 << 30
    x = jnp.zeros(size // 4, jnp.float32)
    return jax.jit(lambda x: x + 1), [(x,)], 2.0 * size
