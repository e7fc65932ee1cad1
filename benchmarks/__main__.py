"""This library beside its peers, in one process: table, JSON and plots.

python -m benchmarks                          # the platform's cases, every peer that is there
python -m benchmarks --cases packed --peers xla,torch --repeats 9 --out out/bench
python -m benchmarks --suite cpu              # the CPU kernels' bars, each beside what it is compared with
python -m benchmarks --suite cuda             # the same of the CUDA kernels
python -m benchmarks --suite hopper           # and of the sm_90a forward
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import jax

from jax_flash import backends

from . import cases, measure, peers, report, sections

PASSES = ("forward", "backward")


def require_library() -> None:
    """Stops where there would be only peers to measure."""
    name = {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend())
    for backend in backends():
        if backend.implementation == name and backend.problem:
            sys.exit(f"python -m benchmarks: {name} is {backend.problem}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default="", help="only cases whose name holds this")
    parser.add_argument("--peers", default=",".join(list(peers.PEERS)[1:]), help="separated by commas")
    parser.add_argument("--passes", default="forward,backward", help="forward, backward or both")
    parser.add_argument("--repeats", type=int, default=7, help="the median of this many is reported")
    parser.add_argument("--seconds", type=float, default=0.05, help="length of one repeat")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parser.add_argument(
        "--suite", choices=["cpu", "cuda", "hopper"], help="sections and bars of a suite_*.py instead"
    )
    parser.add_argument("--sections", default="", help="of the suite, separated by commas; all by default")
    options = parser.parse_args(arguments)
    require_library()
    if options.suite:
        return run_suite(parser, options)
    platform = jax.default_backend()
    chosen = [c for c in (cases.GPU if platform == "gpu" else cases.CPU) if options.cases in c.name]
    if not chosen:
        parser.error(f"--cases: no case's name holds {options.cases!r}")
    names = ["jax_flash", *(name for name in options.peers.split(",") if name)]
    passes = options.passes.split(",")
    unknown = (set(names) - set(peers.PEERS)) | (set(passes) - set(PASSES))
    if unknown:
        parser.error(f"not known: {', '.join(sorted(unknown))}")
    run: dict[str, Any] = {
        "header": report.header(arguments),
        "device": device_rates(platform, sorted({c.dtype for c in chosen}), options),
        "passes": passes,
        "peers": names,
        "cases": [],
    }
    for case in chosen:
        run["cases"].append(run_case(case, names, passes, platform, options))
        print(f"{case.name}: {summary(run['cases'][-1])}", file=sys.stderr, flush=True)
    there = [name for name in names[1:] if any(_ran(result, name) for result in run["cases"])]
    run["peers"] = [names[0], *there]
    report.write(run, options.out)
    print(report.markdown(run))
    return 0


def run_suite(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    suite = importlib.import_module(f".suite_{options.suite}", __package__).SUITE
    chosen = options.sections.split(",") if options.sections else list(suite.sections)
    unknown = [name for name in chosen if name not in suite.sections]
    if unknown:
        parser.error(f"--sections: {', '.join(unknown)}; there are {', '.join(suite.sections)}")
    if jax.default_backend() != suite.platform:
        parser.error(f"--suite: {options.suite} runs on {suite.platform}, this is {jax.default_backend()}")
    return sections.run(suite, chosen, options.out)


def device_rates(platform: str, dtypes: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """What the device does by itself: products in each dtype, and copies."""
    rates: dict[str, Any] = {}
    for dtype in dtypes:
        call, arguments, flop = measure.matmul_call(platform, dtype)
        rates[f"matmul {dtype}"] = {"flop": flop, **timed({"": (call, arguments)}, options)[""]}
    call, arguments, size = measure.copy_call(platform)
    rates["copy"] = {"bytes": size, **timed({"": (call, arguments)}, options)[""]}
    return rates


def timed(calls: dict[str, Any], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    times = measure.interleaved(calls, options.repeats, options.seconds)
    return {name: measure.summary(t) for name, t in times.items()}


def run_case(
    case: cases.Case, names: list[str], passes: list[str], platform: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Every pass of every implementation that takes the case; the others' reasons."""
    first = cases.make_inputs(case)
    copies = measure.copies_for((first.positional, first.dout), platform)
    inputs = [first, *(cases.make_inputs(case, seed) for seed in range(1, copies))]
    calls: dict[str, dict[str, Any]] = {pass_: {} for pass_ in passes}
    results: dict[str, dict[str, Any]] = {pass_: {} for pass_ in passes}
    for name in names:
        for pass_ in passes:
            try:
                call, arguments = peers.calls(name, case, pass_, inputs)
                jax.block_until_ready(call(*arguments[0]))
                calls[pass_][name] = call, arguments
            except (peers.Refused, NotImplementedError, ValueError, RuntimeError) as error:
                results[pass_][name] = {"refused": str(error).split("\n")[0][:200]}
    for pass_ in passes:
        results[pass_] |= timed(calls[pass_], options)
    flop = {pass_: cases.flop(case, pass_) for pass_ in passes}
    chosen = {"name": case.name, "dtype": case.dtype, "needs": sorted(cases.needs(case))}
    return {**chosen, "flop": flop, "copies": copies, "results": results}


def _ran(result: dict[str, Any], name: str) -> bool:
    return any("median" in by_name[name] for by_name in result["results"].values())


def summary(result: dict[str, Any]) -> str:
    """One line while it runs: milliseconds of each implementation."""
    parts = []
    for pass_, by_name in result["results"].items():
        times = (f"{name} {r['median'] * 1e3:.3f}" for name, r in by_name.items() if "median" in r)
        parts.append(f"{pass_} ms: {', '.join(times)}")
    return "; ".join(parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
