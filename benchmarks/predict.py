"""Step times and memory on many devices, from the rates of one kernel and one link.

python -m benchmarks.predict                           # 8, 64 and 512 devices, from the rates written below
python -m benchmarks.predict out/bench/report.json     # also compared with a run of the scaling suite

The formulas follow jax_flash/sequence and jax_flash/all_to_all.py. A device multiplies its queries with one shard of
keys after the other. The next shard arrives meanwhile, so only the longer of the two times counts. All-to-all is not
hidden, because no product can start before it and nothing can be sent before the end.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import flop
from .cases import Case, ring_case

PER_HOST = 8  # devices


@dataclass(frozen=True)
class Rates:
    """Measured rates of one device and one link, per second. `forward` and `both` are FLOP of attention."""

    forward: float = 640e12
    both: float = 560e12
    dense: float = 600e12  # FLOP of the other products of a training step
    memory: float = 4.0e12  # bytes read and written
    link: float = 348e9  # bytes in one direction between two devices of a host
    network: float = 45e9  # between devices of two hosts, one 400 Gbit/s adapter for each

    def between(self, devices: int) -> float:
        return self.link if devices <= PER_HOST else self.network


H200 = Rates()


def shard_bytes(case: Case, devices: int) -> float:
    """Keys and values of one device."""
    return 2.0 * case.b * case.sk / devices * case.hk * case.d * itemsize(case)


def itemsize(case: Case) -> int:
    return 4 if case.dtype == "float32" else 2


# --- time -------------------------------------------------------------------------------------------------------


def ring_seconds(case: Case, pass_: str, devices: int, rates: Rates, order: str = "contiguous") -> float:
    """Seconds of one pass of ring attention: the visits of the device with the most work."""
    if pass_ == "both":
        forward = _ring(case, "forward", devices, rates, order)
        return forward + _ring(case, "backward", devices, rates, order)
    return _ring(case, pass_, devices, rates, order)


def _ring(case: Case, pass_: str, devices: int, rates: Rates, order: str) -> float:
    """Sums over visits the longer of multiplying the keys and receiving those of the next visit."""
    backward = pass_ == "backward"
    work = flop.attention(case, pass_) / _rate(case, pass_, rates)
    shares = visit_shares(case, devices, order)
    # A part of the results is read, and its float32 sum is read and written.
    results = (3 if backward else 1) * case.b * case.sq / devices * case.hq * case.d
    joining = results * (itemsize(case) + 8) / rates.memory
    sent = (2 if backward else 1) * reach(case, devices) * shard_bytes(case, devices)
    moving, last = sent / rates.between(devices), len(shares) - 1
    seconds = sum(
        max(share * work + (joining if n else 0.0), moving if n < last else 0.0)
        for n, share in enumerate(shares)
    )
    return seconds + (
        moving / 2 if backward and devices > 1 else 0.0
    )  # the last gradients return to their owners


def _rate(case: Case, pass_: str, rates: Rates) -> float:
    if pass_ == "forward":
        return rates.forward
    seconds = flop.attention(case, "both") / rates.both - flop.attention(case, "forward") / rates.forward
    return flop.attention(case, "backward") / seconds


def visit_shares(case: Case, devices: int, order: str) -> list[float]:
    """The part of the FLOP of the whole call that the busiest device has in each visit; windows are shorter than a
    shard."""
    n = devices
    if case.window is not None:
        left, chunk = min(case.window[0] or 0, case.sk - 1), case.sk / n
        pairs = case.sk * (left + 1) - left * (left + 1) / 2
        before = min(left, chunk) * (min(left, chunk) + 1) / 2  # the corner of the band in the shard before
        return [(chunk * (left + 1) - before) / pairs] + [before / pairs] * (n > 1)
    if not case.causal:
        return [1 / n**2] * n
    if order == "zigzag":
        return [1 / n**2] * n
    return [1 / n**2] + [2 / n**2] * (n - 1)


def reach(case: Case, devices: int) -> float:
    """The part of a shard of keys that is sent: under a window, the keys that queries of the next shard see."""
    return 1.0 if case.window is None else min(1.0, (case.window[0] or 0) / (case.sk / devices))


def all_to_all_seconds(case: Case, pass_: str, devices: int, rates: Rates) -> float:
    """Seconds of the ordinary call on a share of the heads, with transfers of q, k, v and out or of their gradients."""
    share = flop.attention(case, pass_) / devices
    seconds = share / (rates.forward if pass_ == "forward" else rates.both)
    heads = 2 * case.hq + 2 * max(case.hk, min(case.hq, devices))
    sent = case.b * case.sq / devices * heads * case.d * itemsize(case) * (devices - 1) / devices
    return seconds + (1 if pass_ == "forward" else 2) * sent / rates.between(devices)


@dataclass(frozen=True)
class Model:
    """A transformer and its batch; the defaults have the weights of a model of 8·10⁹."""

    layers: int = 32
    width: int = 4096
    hidden: int = 14336 * 3 // 2  # of an MLP of two products
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def weights(self) -> float:
        heads = 2 * self.width + 2 * self.kv_heads * self.head_dim
        return float(self.layers * self.width * (heads + 2 * self.hidden))

    def case(self, length: int) -> Case:
        h = self.width // self.head_dim
        sizes = {"b": 1, "sq": length, "sk": length, "hq": h, "hk": self.kv_heads, "dtype": "bfloat16"}
        return Case("", causal=True, d=self.head_dim, dv=self.head_dim, **sizes)


def step_seconds(
    model: Model, length: int, devices: int, rates: Rates, mode: str = "ring"
) -> dict[str, float]:
    """A training step on one sequence that is split over all devices, in zigzag order: its parts, and their sum.

    Weights are sharded over the devices: they are gathered for each layer and direction in bfloat16 and their
    gradients are scattered, during the products of another layer; the longer of the two counts.
    """
    case = model.case(length)
    attend = all_to_all_seconds if mode == "all_to_all" else lambda *x: ring_seconds(*x, order="zigzag")
    attention = model.layers * attend(case, "both", devices, rates)
    dense = 6 * model.weights * length / devices / rates.dense
    weights = 3 * 2 * model.weights / rates.between(devices)
    return {
        "attention": attention,
        "dense": dense,
        "weights": weights,
        "step": attention + max(dense, weights),
    }


# --- memory -----------------------------------------------------------------------------------------------------


def layer_bytes(case: Case, devices: int) -> float:
    """At the peak of one layer's backward on each device (scaling.layer_job), in arrays of a shard's size.

    x and its gradient, q k v out and out's gradient; dq, dk and dv, twice for two visits, and those of dk and dv that
    travel; the next shard of keys; with more than two visits float32 sums of dq, dk and dv. Then lse and delta, and the
    weights with their gradients.
    """
    a = case.b * case.sq / devices * case.hq * case.d * itemsize(case)
    visits = 0 if devices == 1 else 3 + 2 + 2
    arrays = 2 + 5 + 3 + visits + (3 * 4 / itemsize(case) if devices > 2 else 0)
    rows = 2 * 4 * case.b * case.sq / devices * case.hq
    weights = 2 * 4 * (case.hq * case.d) ** 2 * itemsize(case)
    return arrays * a + rows + weights


# --- tables -----------------------------------------------------------------------------------------------------


def table(rates: Rates, model: Model = Model()) -> list[str]:
    """Seconds of a training step, and the share of it that one device's rates alone would need."""
    lines = ["| devices | tokens | ring | of linear | all-to-all | of linear |", "|---|---|---|---|---|---|"]
    for devices in (8, 64, 512):
        for length in (1 << 17, 1 << 20, 1 << 23):
            alone = step_seconds(model, length, 1, rates)
            ideal = (alone["attention"] + alone["dense"]) / devices
            cells = []
            for mode in ("ring", "all_to_all"):
                if mode == "all_to_all" and model.case(length).hq % devices:
                    cells += ["–", "–"]
                    continue
                seconds = step_seconds(model, length, devices, rates, mode)["step"]
                cells += [f"{seconds:.3g} s", f"{ideal / seconds:.2f}"]
            lines.append(f"| {devices} | {length:,} | " + " | ".join(cells) + " |")
    return lines


def measured_rates(cells: list[dict[str, Any]], rates: Rates = H200) -> Rates:
    """The rates that a run of the scaling suite found: of one device at its longest sequence, and of its link."""
    for cell in sorted(cells, key=lambda c: c.get("s", 0)):
        if cell["kind"] == "sequence" and cell["what"] == "full":
            rate = cell["flop"] / cell["times"]["one device"]["median"]
            rates = replace(rates, **{cell["pass"]: rate})
        if cell["kind"] == "link":
            ways = [name for name in cell["times"] if name.startswith("ppermute")]
            best = max(cell["bytes"][name] / cell["times"][name]["median"] for name in ways)
            rates = replace(rates, link=best)
    return rates


def check(cells: list[dict[str, Any]], rates: Rates) -> list[str]:
    """Predicted and measured times, for every way to split a sequence that a run timed.

    The time of one device is the measured one, case by case, so the cost of splitting alone is predicted.
    """
    lines = ["| call | way | predicted ms | measured ms | measured / predicted |", "|---|---|---|---|---|"]
    for cell in cells:
        if cell["kind"] != "sequence":
            continue
        case = ring_case(cell["s"], cell["what"])
        alone = cell["times"]["one device"]["median"]
        own = replace(rates, **{cell["pass"]: cell["flop"] / alone})
        for way, times in cell["times"].items():
            if way == "one device" or "median" not in times:
                continue
            if way == "all_to_all":
                seconds = all_to_all_seconds(case, cell["pass"], cell["devices"], own)
            else:
                order = "zigzag" if way == "zigzag" else "contiguous"
                seconds = ring_seconds(case, cell["pass"], cell["devices"], own, order)
            found = times["median"]
            lines.append(
                f"| {cell['name']} | {way} | {seconds * 1e3:.2f} | {found * 1e3:.2f} | {found / seconds:.2f} |"
            )
    return lines


def main(arguments: list[str]) -> int:
    rates = H200
    if arguments:
        sections = json.loads(Path(arguments[0]).read_text())["sections"]
        cells = [cell for section in sections.values() for cell in section["cells"]]
        rates = measured_rates(cells)
        print("\n".join(check(cells, rates)), end="\n\n")
    print(rates, end="\n\n")
    print("\n".join(table(rates)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
