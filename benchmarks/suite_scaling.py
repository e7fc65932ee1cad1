"""The scaling suite: several GPUs of one host against one of them, in one process.

python -m benchmarks --suite scaling                                     # all sections, on all devices
python -m benchmarks --suite scaling --sections "link,ring 32768"        # these, into the report that is there
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from . import bars_scaling, flop, measure, overlap, predict, scaling, training_step
from .bars import Cell, chosen
from .cases import ring_case
from .suite import Suite

PASSES = ("forward", "both")
LENGTHS = (32768, 131072)
TRAINED = ("data", "heads", "sequence")  # axes of the training step's mesh
LINK_SIZES = tuple(size << 20 for size in (1, 16, 64, 512))
BUDGET = 1.0  # seconds for all timed bursts of a call on one device; its warm-up takes as long
ESTIMATE = 500e12  # FLOP/s of one device, to estimate how long a call takes


def device_count() -> int:
    count = jax.device_count()
    if count < 2:
        sys.exit("python -m benchmarks: the scaling suite needs two devices or more")
    return count


def timed(calls: measure.Calls, work: float = 0.0) -> dict[str, Any]:
    """Times calls as measure.py says; calls with much work (FLOP) have fewer repeats."""
    longest = work / ESTIMATE
    return measure.in_turns(calls, int(max(2, min(measure.REPEATS, BUDGET / max(longest, measure.BURST)))))


def sequence_cells(s: int, **sizes: int) -> Iterator[Cell]:
    """The sequence split in every way: full, causal and with a window."""
    count, jobs, tags = device_count(), {}, []
    drawn = {
        n: scaling.draw(ring_case(s, "full", **sizes), scaling.mesh_of(n), scaling.SHARD) for n in (1, count)
    }
    for what in ("full", "causal", "window"):
        case = ring_case(s, what, **sizes)
        for pass_ in PASSES:
            ways = scaling.sequence_jobs(case, pass_, count, drawn)
            tags.append((case, what, pass_, list(ways)))
            jobs |= {f"{case.name} {pass_} {way}": job for way, job in ways.items()}
    calls, refused = scaling.compiled_or_refused(jobs)
    for case, what, pass_, ways in tags:
        name = f"{case.name} {pass_}"
        cell = {"kind": "sequence", "name": name, "what": what, "pass": pass_, "s": s, "devices": count}
        work = flop.attention(case, pass_)
        there = {way: calls[f"{name} {way}"] for way in ways if f"{name} {way}" in calls}
        missing = {way: refused[f"{name} {way}"] for way in ways if way not in there}
        yield cell | {"flop": work, "times": timed(there, work) | missing}


def sharded_cells(s: int = 16384, h: int = 16) -> Iterator[Cell]:
    count = device_count()
    case = ring_case(s, "causal", h).replace(b=2 * count)
    for pass_ in PASSES:
        calls = scaling.compiled(scaling.sharded_jobs(case, pass_, count))
        found = {way: scaling.collectives(call) for way, (call, _) in calls.items()}
        cell = {"kind": "sharded", "name": f"b{case.b} {case.name} {pass_}", "pass": pass_, "devices": count}
        work = flop.attention(case, pass_)
        yield cell | {"collectives": found, "flop": work, "times": timed(calls, work)}


def link_cells(sizes: tuple[int, ...] = LINK_SIZES) -> Iterator[Cell]:
    count = device_count()
    calls = scaling.compiled(scaling.link_jobs(count, sizes))
    by_name = {scaling.size_name(size): size for size in sizes}
    moved = {}
    for name in calls:
        call, size = name.split(" ", 1)
        moved[name] = by_name[size] * ((count - 1) / count if call == "all_to_all" else 1)
    yield {"kind": "link", "name": "between devices", "devices": count, "bytes": moved, "times": timed(calls)}


def training_cells(axes: tuple[str, ...] = TRAINED, **sizes: Any) -> Iterator[Cell]:
    """One step of examples/train_lm.py, scaled up, on one device and on all devices along each of the axes."""
    count = device_count()
    meshes = {"one device": ""} | {axis: f"{axis}={count}" for axis in axes}
    steps, programs, work = training_step.scaled(meshes, count, **sizes)
    found = {name: scaling.collectives(program) for name, program in programs.items()}
    calls = {name: (step, [()]) for name, step in steps.items()}
    cell = {"kind": "training", "name": f"training step, {', '.join(axes)}", "devices": count, "flop": work}
    yield cell | {"collectives": found, "times": timed(calls, work)}


def memory_cells(s: int = 1 << 20, h: int = 8, d: int = 128) -> Iterator[Cell]:
    """The time of one layer, forward and backward, and its memory, measured and by the formula."""
    count = device_count()
    case = ring_case(s, "causal", h, d)
    ((program, (arguments,)),) = scaling.compiled({"": scaling.layer_job(case, count)}).values()
    jax.block_until_ready(program(*arguments))
    start = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    seconds = time.perf_counter() - start
    statistics = jax.devices()[0].memory_stats() or {}
    cell = {"kind": "memory", "name": f"layer {case.name}", "devices": count, "s": s}
    work = flop.attention(case, "both")
    yield cell | {
        "flop": work,
        "program": scaling.program_bytes(program),
        "peak": statistics.get("peak_bytes_in_use", 0),
        "formula": predict.layer_bytes(case, count),
        "times": {f"{count} devices": measure.summary([seconds])},
    }


def overlap_cells(s: int = 131072, h: int = 16) -> Iterator[Cell]:
    count = device_count()
    case = ring_case(s, "causal", h)
    inputs = scaling.draw(case, scaling.mesh_of(count), scaling.SHARD)
    for order in ("zigzag", "contiguous"):
        job = scaling.prepare(scaling.ring(case, scaling.mesh_of(count), order=order), "both", inputs)
        ((program, (arguments,)),) = scaling.compiled({"": job}).values()
        profile = overlap.profiled(program, arguments)
        yield {"kind": "overlap", "name": f"{case.name} both {order}", "devices": count, "profile": profile}


SECTIONS: dict[str, Callable[[], Iterator[Cell]]] = {
    "link": link_cells,
    **{f"ring {s}": functools.partial(sequence_cells, s) for s in LENGTHS},
    "sharded": sharded_cells,
    "training": training_cells,
    **{f"training {axis}": functools.partial(training_cells, (axis,)) for axis in TRAINED},
    "memory": memory_cells,
    "overlap": overlap_cells,
}


def rates(cells: list[Cell]) -> list[str]:
    return [f"{count} devices of one host" for count in sorted({c["devices"] for c in cells})]


def timeline(cells: list[Cell], plt: Any) -> Any:
    shown = [c for c in chosen(cells, "overlap") if c["profile"]]
    return overlap.draw(shown[0]["profile"], plt) if shown else None


SUITE = Suite(
    "scaling",
    "gpu",
    SECTIONS,
    bars_scaling.judge,
    bars_scaling.verdict,
    rates,
    figures={"timeline": timeline},
    command=("--suite", "scaling"),
)
