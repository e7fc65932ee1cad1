"""Reads a profile: the time of transfers between devices, and the part of it in which kernels run too."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

Interval = tuple[float, float]  # seconds
TRANSFERS = ("nccl", "memcpyp2p", "collective-permute", "all-to-all", "sendrecv")
SHOWN = 200  # events of a device that the timeline shows


def profiled(call: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Profiles one call, after one that is not profiled; the transfers and kernels of each device."""
    jax.block_until_ready(call(*arguments))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call(*arguments))
        (path,) = Path(folder).rglob("*.xplane.pb")
        return summary(read(path))


def read(path: Path) -> dict[str, list[tuple[str, str, float, float]]]:
    """Device → the events of its streams: (stream, name, start, end); the first starts at 0."""
    devices = {}
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if "/device:GPU" not in plane.name:
            continue
        events = [
            (line.name, event.name, event.start_ns * 1e-9, (event.start_ns + event.duration_ns) * 1e-9)
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
        if events:
            devices[plane.name] = sorted(events, key=lambda event: event[2])
    first = min((events[0][2] for events in devices.values()), default=0.0)
    return {
        name: [(stream, what, start - first, end - first) for stream, what, start, end in events]
        for name, events in devices.items()
    }


def summary(devices: dict[str, list[tuple[str, str, float, float]]]) -> dict[str, Any]:
    """By device: seconds of transfers, of transfers during which a kernel runs, and of kernels; and the timeline."""
    found = {}
    for name, events in devices.items():
        moving = union((start, end) for _, what, start, end in events if is_transfer(what))
        running = union((start, end) for _, what, start, end in events if not is_transfer(what))
        found[name] = {
            "transfers": length(moving),
            "hidden": length(intersection(moving, running)),
            "kernels": length(running),
            "span": max(end for *_, end in events),
            "longest": [event for event in events if event[3] - event[2] >= _shortest_shown(events)],
        }
    return found


def _shortest_shown(events: list[tuple[str, str, float, float]]) -> float:
    lengths = sorted((end - start for _, _, start, end in events), reverse=True)
    return lengths[min(SHOWN, len(lengths)) - 1]


def is_transfer(name: str) -> bool:
    return any(word in name.lower() for word in TRANSFERS)


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Disjoint intervals, in order, that cover the same time."""
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def intersection(one: list[Interval], other: list[Interval]) -> list[Interval]:
    """The time that both disjoint, ordered lists cover."""
    found, i, j = [], 0, 0
    while i < len(one) and j < len(other):
        start, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if start < end:
            found.append((start, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return found


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def draw(devices: dict[str, Any], plt: Any) -> Any:
    """A line per device for kernels and one for transfers, over time."""
    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.5 * len(devices)), layout="constrained")
    labels = []
    for device, found in sorted(devices.items()):
        for what, colour in (("kernels", "tab:blue"), ("transfers", "tab:orange")):
            spans = [
                (start * 1e3, (end - start) * 1e3)
                for _, name, start, end in found["longest"]
                if is_transfer(name) == (what == "transfers")
            ]
            axes.broken_barh(spans, (len(labels), 0.8), color=colour)
            labels.append(f"{device.rsplit('/', 1)[-1]} {what}")
    axes.set_yticks([n + 0.4 for n in range(len(labels))], labels, fontsize=7)
    axes.set_xlabel("milliseconds")
    return figure
