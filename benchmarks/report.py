"""A run's results as a table, as JSON and as bars."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

import jax_flash

from .bars import geometric_mean

PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "jax-cuda12-plugin",
    "nvidia-cudnn-cu13",
    "tokamax",
    "fa4-jax",
    "flash-attn3-jax",
    "jax-linear-attention",
    "torch",
)


def header(arguments: list[str]) -> dict[str, Any]:
    """What a reader needs to judge or repeat the run."""
    device = jax.devices()[0]
    versions = {"python": platform.python_version(), "jax_flash": jax_flash.__version__}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": _cpu_name() if device.platform == "cpu" else device.device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "driver": _driver() if device.platform == "gpu" else None,
        "versions": versions,
        "commit": commit(Path(__file__).parent),
        "command": shlex.join(["python", "-m", "benchmarks", *arguments]),
    }


@functools.cache
def commit(folder: Path) -> str | None:
    """The commit of a checkout; None where the folder is in none."""
    return _output("git", "-C", str(folder), "rev-parse", "--short", "HEAD")


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


@functools.cache
def _driver() -> str | None:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return None


def markdown(run: dict[str, Any]) -> str:
    """The whole report: header, what the device does by itself, one table per pass, ratios to each peer."""
    head = run["header"]
    lines = [f"# {head['device']}", ""]
    lines += [
        f"- {name}: {value}" for name, value in head.items() if value and name not in ("device", "versions")
    ]
    lines += [f"- versions: {', '.join(f'{k} {v}' for k, v in head['versions'].items())}"]
    lines += ["- in this run: " + ", ".join(f"{name} {_rate(r)}" for name, r in run["device"].items()), ""]
    lines[-1:] = [*(f"- without {peer}: {reason}" for peer, reason in run["absent"].items()), ""]
    for pass_ in run["passes"]:
        lines += [f"## {pass_.capitalize()}", "", *_table(run, pass_), ""]
    return "\n".join(lines)


def _rate(result: dict[str, Any]) -> str:
    if "bytes" in result:
        return f"{result['bytes'] / result['median'] / 1e9:.0f} GB/s"
    return f"{result['flop'] / result['median'] / 1e9:,.0f} GFLOP/s"


def _table(run: dict[str, Any], pass_: str) -> list[str]:
    peers = run["peers"]
    columns = [f"{peers[0]} ms", "GFLOP/s", "of matmul", "±"] + [f"× {peer}" for peer in peers[1:]]
    lines = ["| case | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for case in run["cases"]:
        own = case["results"][pass_][peers[0]]
        if "refused" in own:
            lines.append(f"| {case['name']} | {own['refused']} |" + " |" * (len(columns) - 1))
            continue
        rate = case["flop"][pass_] / own["median"]
        matmul = run["device"][f"matmul {case['dtype']}"]
        cells = [
            f"{own['median'] * 1e3:.3f}",
            f"{rate / 1e9:,.0f}",
            f"{rate / (matmul['flop'] / matmul['median']):.2f}",
            f"{own['spread']:.0%}",
        ]
        for peer in peers[1:]:
            theirs = case["results"][pass_][peer]
            cells.append("–" if "refused" in theirs else f"{theirs['median'] / own['median']:.2f}")
        lines.append(f"| {case['name']} | " + " | ".join(cells) + " |")
    means = [_geometric_mean(run, pass_, peer) for peer in peers[1:]]
    lines.append("| geometric mean | | | | | " + " | ".join(means) + " |")
    reasons = {
        f"- {peer} did not run some cases: {case['results'][pass_][peer]['refused']}"
        for case in run["cases"]
        for peer in peers[1:]
        if "refused" in case["results"][pass_][peer]
    }
    return [*lines, "", *sorted(reasons)]


def _geometric_mean(run: dict[str, Any], pass_: str, peer: str) -> str:
    ratios = []
    for case in run["cases"]:
        own, theirs = (case["results"][pass_][name] for name in (run["peers"][0], peer))
        if "refused" not in own and "refused" not in theirs:
            ratios.append(theirs["median"] / own["median"])
    return f"{geometric_mean(ratios):.2f}" if ratios else "–"


def write(run: dict[str, Any], folder: Path) -> None:
    """report.md, report.json and one PNG per pass."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(run, indent=1) + "\n")
    text = markdown(run)
    for pass_ in run["passes"]:
        if _plot(run, pass_, folder / f"{pass_}.png"):
            text += f"\n![{pass_}]({pass_}.png)\n"
    (folder / "report.md").write_text(text)


def _plot(run: dict[str, Any], pass_: str, path: Path) -> bool:
    try:
        import matplotlib
    except ImportError:
        print("benchmarks: matplotlib is not installed, no plots", file=sys.stderr)
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases, peers = run["cases"], run["peers"]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.16 * len(cases) * len(peers)), layout="constrained")
    height = 0.85 / len(peers)
    for index, peer in enumerate(peers):
        rates = []
        for case in cases:
            result = case["results"][pass_][peer]
            rates.append(0 if "refused" in result else case["flop"][pass_] / result["median"] / 1e9)
        axes.barh([row + index * height for row in range(len(cases))], rates, height, label=peer)
    axes.set_yticks([row + 0.4 for row in range(len(cases))], [case["name"] for case in cases], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("GFLOP/s, visible pairs only")
    axes.set_title(f"{pass_}, {run['header']['device']}")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
