"""Measures what an option adds to the forward's time on this machine's device: one line per case.

python -m benchmarks.option_cost        `return_max` may add 2%, sinks of each token 1% to those of each head (issue 38)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from . import adapters, cases, measure, peers
from .cases import Case

CASES = {
    "gpu": (
        *(cases.gpu_case(d, 4096, causal) for d in (64, 128, 256) for causal in (False, True)),
        cases.gpu_case(128, 16384, causal=True),
        cases.gpu_documents(128, True),
        cases.gpu_options(128)["softcap"],
    ),
    "cpu": (cases.gpu_case(128, 1024, causal=True, b=1, hq=4, hk=4),),
}


def sinks_by_token(case: Case, inputs: list[Any]) -> list[Any]:
    """The same inputs with the sinks of each head repeated for each token: [b, sq, hq], packed [tq, hq]."""

    def repeated(x: Any) -> Any:
        shape = x.positional["query"].shape[:-1]
        return dataclasses.replace(
            x, keywords=x.keywords | {"sinks": jnp.broadcast_to(x.keywords["sinks"], shape)}
        )

    return [repeated(x) for x in inputs]


def calls_of(case: Case) -> dict[str, measure.Calls]:
    """For each option the forward without it and the forward with it."""
    inputs = peers.draw_inputs(case)
    found: dict[str, measure.Calls] = {
        "return_max": {
            "without": peers.pass_calls(adapters.ours(case), "forward", inputs),
            "with": peers.pass_calls(adapters.ours(case, return_max=True), "forward", inputs),
        }
    }
    if case.softcap is None:
        sunk = case.replace(sinks=True)
        of_heads = peers.draw_inputs(sunk)
        found["sinks of each token"] = {
            "without": peers.pass_calls(adapters.ours(sunk), "forward", of_heads),
            "with": peers.pass_calls(adapters.ours(sunk), "forward", sinks_by_token(sunk, of_heads)),
        }
    return found


def main() -> None:
    for case in CASES[jax.default_backend()]:
        for option, calls in calls_of(case).items():
            times = measure.in_turns(calls)
            without, with_option = (times[name]["median"] for name in ("without", "with"))
            print(
                f"{case.name}, {option}: {without * 1e6:.1f} µs, {100 * (with_option / without - 1):+.2f}% "
                f"{measure.plus_minus(times, 2)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
