"""The limits of several GPUs against one, judged from the cells of a run."""

from __future__ import annotations

from collections.abc import Iterator

from .bars import Bar, Cell, chosen, least, most, ran

RING = {131072: 0.95, 32768: 0.9}  # length → share of linear speed-up, full and zigzag causal
CONTIGUOUS, WINDOW = 0.9, 0.9  # share of its own bound; share of linear speed-up
SHARDED, TRAINING = 0.97, 0.93  # shares of linear speed-up


def judge(cells: list[Cell]) -> list[Bar]:
    """The bars whose cells were measured."""
    return [*_sequence(cells), *_sharded(cells), *_training(cells)]


def of_linear(cell: Cell, way: str) -> float:
    """The speed-up over one device, divided by the number of devices."""
    times = cell["times"]
    return float(times["one device"]["median"] / times[way]["median"] / cell["devices"])


def contiguous_bound(devices: int) -> float:
    """The largest share of linear speed-up in contiguous causal order, where the last device computes n − 1/2 blocks
    and the mean device n/2."""
    return devices / (2 * devices - 1)


def _sequence(cells: list[Cell]) -> Iterator[Bar]:
    for length, limit in RING.items():
        for pass_ in ("forward", "both"):
            here = chosen(cells, "sequence", s=length) and chosen(
                cells, "sequence", s=length, **{"pass": pass_}
            )
            for what, way, asked in (
                ("full", "contiguous", limit),
                ("causal", "zigzag", limit),
                ("window", "contiguous", WINDOW),
            ):
                values = [(of_linear(c, way), c["name"]) for c in here if c["what"] == what and ran(c, way)]
                yield from least(f"{what} {way} s{length} {pass_}, of linear", values, asked)
            values = [
                (of_linear(c, "contiguous") / contiguous_bound(c["devices"]), c["name"])
                for c in here
                if c["what"] == "causal" and ran(c, "contiguous")
            ]
            yield from least(f"causal contiguous s{length} {pass_}, of its bound", values, CONTIGUOUS)


def _sharded(cells: list[Cell]) -> Iterator[Bar]:
    here = chosen(cells, "sharded")
    for pass_ in ("forward", "both"):
        values = [
            (of_linear(c, way), f"{c['name']}, {way}")
            for c in here
            if c["pass"] == pass_
            for way in c["times"]
            if way != "one device"
        ]
        yield from least(f"batch and heads {pass_}, of linear", values, SHARDED)
    values = [(float(sum(map(len, c["collectives"].values()))), c["name"]) for c in here]
    yield from most("batch and heads, collectives", values, 0)


def _training(cells: list[Cell]) -> Iterator[Bar]:
    for cell in chosen(cells, "training"):
        for way in cell["times"]:
            if way != "one device" and "," not in way:  # the others have XLA's flags set
                yield Bar(
                    f"training step, {way}, of linear", of_linear(cell, way), True, TRAINING, cell["name"]
                )


def verdict(cell: Cell) -> str:
    match cell["kind"]:
        case "link":
            rates = (
                f"{name} {cell['bytes'][name] / t['median'] / 1e9:.0f}" for name, t in cell["times"].items()
            )
            return "GB/s a direction: " + ", ".join(rates)
        case "memory":
            return (
                f"program {cell['program']['all'] / 2**30:.1f} GiB, allocator's peak {cell['peak'] / 2**30:.1f}, "
                f"formula {cell['formula'] / 2**30:.1f} GiB a device"
            )
        case "overlap":
            shares = [
                f"{x['hidden'] / max(x['transfers'], 1e-12):.0%} of {x['transfers'] * 1e3:.1f} ms"
                for x in cell["profile"].values()
            ]
            return f"transfers under kernels: {', '.join(shares)}"
    there = [way for way in cell["times"] if way != "one device" and ran(cell, way)]
    ways = ", ".join(f"{way} {of_linear(cell, way):.3f}" for way in there)
    rate = cell["flop"] / cell["times"]["one device"]["median"] / 1e12
    return f"of linear on {cell['devices']}: {ways}; one device {rate:.0f} TFLOP/s"
