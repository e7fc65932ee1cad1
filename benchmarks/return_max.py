"""Measures what `return_max` adds to the forward's time on this machine's device: one line per case.

python -m benchmarks.return_max        the bar is 2% (issue 38)
"""

from __future__ import annotations

import jax

from . import adapters, cases, measure, peers

CASES = {
    "gpu": (
        *(cases.gpu_case(d, 4096, causal) for d in (64, 128, 256) for causal in (False, True)),
        cases.gpu_case(128, 16384, causal=True),
        cases.gpu_documents(128, True),
        cases.gpu_options(128)["softcap"],
    ),
    "cpu": (cases.gpu_case(128, 1024, causal=True, b=1, hq=4, hk=4),),
}


def main() -> None:
    for case in CASES[jax.default_backend()]:
        inputs = peers.draw_inputs(case)
        names = {"without": {}, "with": {"return_max": True}}
        calls = {
            name: peers.pass_calls(adapters.ours(case, **options), "forward", inputs)
            for name, options in names.items()
        }
        times = measure.in_turns(calls)
        without, with_max = (times[name]["median"] for name in names)
        spread = max(times[name]["spread"] for name in names)
        print(
            f"{case.name}: {without * 1e6:.1f} µs, {100 * (with_max / without - 1):+.2f}% (± {100 * spread:.2f}%)"
        )


if __name__ == "__main__":
    main()
