"""Times this library and other implementations in one process; writes tables, JSON and plots.

python -m benchmarks                          # the platform's cases, every peer that is installed
python -m benchmarks --cases causal --peers xla,torch --repeats 9 --out out/bench
python -m benchmarks --suite cpu              # the CPU kernels, with the limits that a run has to reach
python -m benchmarks --suite scaling          # several GPUs of one host against one of them
python -m benchmarks --suite peers --limit 270    # the CUDA kernels against every JAX peer, the most important first
python -m benchmarks --compare ../before      # this checkout against another one: times, and results bit by bit
python -m benchmarks.tune --help              # candidates for rows of csrc/kernels.def, one library for each

benchmarks/measure.py says how calls are timed, benchmarks/README.md how to install the peers without a network.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import jax

from jax_flash import backends

from . import cases, compare, measure, peers, sections, suite_cases
from .suite import Suite

PASSES = ("forward", "backward", "both", "jvp")
OUT = Path("out/bench")


def require_library() -> None:
    """Exits if this library cannot run here, since there would be only peers to measure."""
    name = {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend())
    for backend in backends():
        if backend.implementation == name and backend.problem:
            sys.exit(f"python -m benchmarks: {name} is {backend.problem}")


def parse(arguments: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=OUT, metavar="FOLDER", help=f"of the report; default {OUT}"
    )
    parser.add_argument(
        "--repeats", type=int, help="bursts of each call, not of suites; the median is reported"
    )
    plain = parser.add_argument_group("beside peers")
    plain.add_argument(
        "--cases", default="", metavar="TEXT", help="only cases whose name holds this; TEXT|TEXT: one of them"
    )
    plain.add_argument(
        "--peers",
        default="",
        metavar="NAMES",
        help=f"of {', '.join(list(peers.PEERS)[1:])}; default the platform's",
    )
    plain.add_argument(
        "--passes", default="forward,backward", help=f"of {', '.join(PASSES)}; default forward,backward"
    )
    plain.add_argument(
        "--seconds", type=float, default=measure.BURST, help="of one burst; default %(default)s"
    )
    suites = parser.add_argument_group("suites")
    suites.add_argument(
        "--suite",
        choices=["cpu", "scaling", "peers"],
        help="the cells and limits of one suite",
    )
    suites.add_argument("--sections", default="", help="of the suite, separated by commas; default all")
    suites.add_argument("--limit", type=float, metavar="SECONDS", help="after which no further cell is begun")
    suites.add_argument(
        "--report-only", action="store_true", help="write the report of what --out holds; measure nothing"
    )
    before = parser.add_argument_group("before and after")
    before.add_argument(
        "--compare",
        type=Path,
        metavar="DIR",
        help="a checkout of another commit, built in place, that ran before",
    )
    before.add_argument(
        "--filter",
        default="",
        metavar="TEXT",
        help="only cells whose name holds this; TEXT|TEXT: one of them",
    )
    return parser, parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    parser, options = parse(arguments)
    if options.suite and options.report_only:
        return sections.report_only(suite_of(options), options.out)
    if options.compare:
        compare.turn_autotuning_off()
    require_library()
    if options.compare:
        repeats = options.repeats or measure.REPEATS
        return compare.run(options.compare, options.filter, repeats, options.out)
    if options.suite:
        return run_suite(parser, options)
    return run_cases(parser, options, arguments)


def suite_of(options: argparse.Namespace) -> Suite:
    suite: Suite = importlib.import_module(f".suite_{options.suite}", __package__).SUITE
    return suite


def run_suite(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    suite = suite_of(options)
    chosen = options.sections.split(",") if options.sections else list(suite.sections)
    unknown = [name for name in chosen if name not in suite.sections]
    if unknown:
        parser.error(f"--sections: {', '.join(unknown)}; there are {', '.join(suite.sections)}")
    if jax.default_backend() != suite.platform:
        parser.error(f"--suite: {options.suite} runs on {suite.platform}, this is {jax.default_backend()}")
    return sections.run(suite, chosen, options.out, options.limit)


def run_cases(parser: argparse.ArgumentParser, options: argparse.Namespace, arguments: list[str]) -> int:
    platform = jax.default_backend()
    known = cases.GPU if platform == "gpu" else cases.CPU
    chosen = [c for c in known if compare.selected(c.name, options.cases)]
    if not chosen:
        parser.error(f"--cases: no case's name holds {options.cases!r}")
    there = [name for name, peer in peers.PEERS.items() if platform in peer.platforms]
    names = ["jax_flash", *options.peers.split(",")] if options.peers else there
    passes = options.passes.split(",")
    unknown = (set(names) - set(peers.PEERS)) | (set(passes) - set(PASSES))
    if unknown:
        parser.error(f"not known: {', '.join(sorted(unknown))}")
    run = suite_cases.Run(platform, chosen, names, options.repeats or measure.REPEATS, options.seconds)
    return sections.run(suite_cases.suite_of(run, PASSES, arguments), passes, options.out, options.limit)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
