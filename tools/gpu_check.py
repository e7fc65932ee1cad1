"""Builds the CUDA library alone, calls its passes through jax.ffi, and holds them against the equations in JAX.

    python3 tools/gpu_check.py                on a machine with a GPU: build, check everything, time it
    python3 tools/gpu_check.py --emulated     on any machine: the same kernels on tests/kernels/emulator, small cases

Needs cmake, a C++20 compiler, jax, and nvcc unless emulated; nothing is installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import cuda_call  # noqa: E402
import gpu_cases  # noqa: E402

Check = tuple[str, Callable[[], None]]


def main() -> int:
    options = parse()
    if options.command_buffers:
        flags = "--xla_gpu_graph_min_graph_size=1 --xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUSTOM_CALL"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    if options.emulated:
        os.environ["JAX_PLATFORMS"] = "cpu"
    library = options.library or (
        cuda_call.build_emulated(options.head_dims, options.archs)
        if options.emulated
        else build(options.archs)
    )
    cuda_call.register(library, "cpu" if options.emulated else "CUDA")
    failed = run_checks(options)
    if not options.emulated and not options.no_timing:
        import gpu_timing

        gpu_timing.time_all()
    print("\n".join(["failed:", *failed]) if failed else "all passed")
    return int(bool(failed))


def build(archs: str) -> Path:
    """The library; prints how long it took and what spills."""
    began = time.time()
    library = cuda_call.build(archs, ROOT / "build" / "gpu-check")
    print(f"built in {time.time() - began:.0f} s", flush=True)
    for kernel, count in cuda_call.spills(library).items():
        if count:
            print(f"spills {count} bytes: {kernel}")
    return library


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--emulated", action="store_true", help="run the kernels on the host")
    parser.add_argument("--head-dims", default="", help="emulated: JAX_FLASH_HEAD_DIMS of the build")
    parser.add_argument("--library", type=Path, help="a library built before")
    parser.add_argument("--archs", default="90a-real", help="JAX_FLASH_CUDA_ARCHS of the build")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--dtypes", default=",".join(gpu_cases.DTYPES), help="those to check")
    parser.add_argument("--no-checks", action="store_true")
    parser.add_argument("--no-timing", action="store_true")
    parser.add_argument(
        "--command-buffers", action="store_true", help="let XLA capture every call in a graph"
    )
    return parser.parse_args()


# --- the checks ----------------------------------------------------------------------------------------------------


def run_checks(options: argparse.Namespace) -> list[str]:
    """The names of the checks that failed. References take longer than kernels: cases run side by side."""
    dtypes = tuple(options.dtypes.split(","))
    cases = gpu_cases.all_cases(options.emulated, dtypes)
    checks: list[Check] = [(case.name, lambda case=case: check_case(case)) for case in cases]
    checks += [
        ("leading dimensions", lambda: check_leading(dtypes[0])),
        ("garbage cu_seqlens", lambda: check_garbage(dtypes[0])),
        ("several calls in one program", lambda: check_program(dtypes[0])),
        ("deterministic backward", lambda: check_repeatable(dtypes[0])),
    ]
    checks = [] if options.no_checks else [check for check in checks if options.only in check[0]]
    workers = 2 if options.emulated else min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        failed = [name for name in pool.map(run_check, checks) if name]
    if "beyond" in options.only or not (options.only or options.emulated or options.no_checks):
        failed += filter(None, [run_check(("offsets beyond 2**31", check_large))])
    return failed


def run_check(check: Check) -> str | None:
    """The name of the check if it failed."""
    name, run = check
    began = time.time()
    try:
        run()
    except Exception as error:
        text = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"[:2000]
        print(f"{name}: FAILED {text} ({time.time() - began:.1f} s)", flush=True)
        return name
    print(f"{name}: ok ({time.time() - began:.1f} s)", flush=True)
    return None


def check_case(case: Any) -> None:
    """What is never read is NaN. Every other case's backward is the deterministic one."""
    import cases

    poisoned = cases.poisoned(case, cases.make_inputs(case))
    spec = cases.spec(case, poisoned)
    spec = dataclasses.replace(spec, deterministic=sum(map(ord, case.name)) % 2 == 1)
    check(spec, cases.operands(poisoned), poisoned.dout, poisoned.dlse, case.softcap)


def check(spec: Any, operands: dict[str, Any], dout: Any, dlse: Any, softcap: Any = None) -> None:
    """Out, lse and the gradients of the custom calls at the contract's tolerance."""
    import jax
    import numpy as np
    import oracle

    out, lse, gradients = jax.tree.map(np.asarray, cuda_call.differentiate(spec, operands, dout, dlse))
    with jax.default_device(jax.devices("cpu")[0]):
        right, low = references(spec, *jax.tree.map(np.asarray, (operands, dout, dlse)))
    oracle.assert_out(out, right[0], low[0], softcap=bool(softcap))
    oracle.assert_lse(lse, right[1])
    half = out.dtype.itemsize == 2
    for name, gradient in gradients.items():
        oracle.assert_gradient(name, gradient, right[2][name], low[2][name], half=half)


def references(spec: Any, operands: dict[str, Any], dout: Any, dlse: Any) -> Any:
    """(out, lse, gradients) by the equations in float32, and with S and P rounded to the input's dtype."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jax_flash import reference

    dtype, leading = operands["query"].dtype, dlse.ndim - (3 if spec.layout == "fixed" else 2)
    lead = dlse.shape[:leading]
    operands = {name: jnp.broadcast_to(x, lead + x.shape[leading:]) for name, x in operands.items()}
    moving = {name: operands[name] for name in ("query", "key", "value", "bias") if name in operands}

    def differentiate(moving: Any, round_to: Any) -> Any:
        def run(moving: Any) -> Any:
            call = lambda x: reference.attention(spec, x, round_to=round_to)  # noqa: E731
            for _ in range(leading):
                call = jax.vmap(call)
            return call(operands | moving)

        (out, lse), pullback = jax.vjp(run, moving)
        return out, lse, pullback((dout.astype(out.dtype), dlse))[0]

    @jax.jit
    def both(moving: Any) -> Any:
        wide = {name: x.astype(jnp.float32) for name, x in moving.items()}
        right = differentiate(wide, None)
        return right, differentiate(moving, dtype if dtype.itemsize == 2 else None)

    return jax.tree.map(np.asarray, both(moving))


def check_leading(dtype: str) -> None:
    """Two leading dimensions; one operand has each of them whole, another 1."""
    import cases
    import jax.numpy as jnp

    for name in ("everything", "packed everything"):
        case = cases.BY_NAME[name].replace(dtype=dtype)
        many = [cases.make_inputs(case, seed) for seed in range(6)]
        inputs = [cases.operands(x) for x in many]
        stacked = {n: jnp.stack([x[n] for x in inputs]).reshape(2, 3, *inputs[0][n].shape) for n in inputs[0]}
        whole = {
            "key": (slice(0, 1), slice(None)),
            "sinks": (slice(None), slice(0, 1)),
            "query": (slice(None),) * 2,
        }
        operands = {n: x[whole.get(n, (slice(0, 1),) * 2)] for n, x in stacked.items()}
        dout, dlse = (
            jnp.stack([getattr(x, n) for x in many]).reshape(2, 3, *getattr(many[0], n).shape)
            for n in ("dout", "dlse")
        )
        check(cases.spec(case, many[0]), operands, dout, dlse, case.softcap)


def check_garbage(dtype: str) -> None:
    """cu_seqlens of any values are read as their running maximum within the operand."""
    import cases
    import jax.numpy as jnp
    import numpy as np

    case = cases.BY_NAME["packed causal, other keys"].replace(dtype=dtype)
    inputs = cases.make_inputs(case)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        garbage = {
            name: jnp.asarray(rng.integers(-20, 40, 4), jnp.int32)
            for name in ("cu_seqlens_q", "cu_seqlens_k")
        }
        garbage["cu_seqlens_k"] = garbage["cu_seqlens_k"].at[3].set(2**31 - 1)
        check(cases.spec(case, inputs), cases.operands(inputs) | garbage, inputs.dout, inputs.dlse)


def check_program(dtype: str) -> None:
    """Fixed and packed calls that feed each other in one jitted program, run again with other values."""
    import cases
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jax_flash import reference

    fixed, packed = (cases.BY_NAME[name].replace(dtype=dtype) for name in ("causal", "packed causal"))
    specs = [cases.spec(case, cases.make_inputs(case)) for case in (fixed, packed)]

    def program(call: Any, a: dict[str, Any], b: dict[str, Any]) -> Any:
        for _ in range(3):
            a = a | {"query": call(specs[0], a)[0] + a["query"]}
            tokens = a["query"].reshape(-1, *b["query"].shape[1:])[: len(b["query"])]
            b = b | {"query": call(specs[1], b)[0] + tokens}
        return b["query"]

    def custom(spec: Any, x: dict[str, Any]) -> Any:
        return cuda_call.call("forward", spec, x)

    ours, right = (
        jax.jit(lambda a, b, call=call: program(call, a, b)) for call in (custom, reference.attention)
    )
    for seed in range(3):
        operands = [cases.operands(cases.make_inputs(case, seed)) for case in (fixed, packed)]
        got, wanted = (np.asarray(call(*operands), np.float32) for call in (ours, right))
        # Six roundings of 2⁻⁸ follow one another on values of a few units.
        assert np.abs(got - wanted).max() <= 0.1, f"out: {np.abs(got - wanted).max()}"
        assert jnp.isfinite(got).all()


def check_repeatable(dtype: str) -> None:
    """deterministic=True: the same bits from every call."""
    import cases
    import jax
    import numpy as np

    case = cases.Case("", sq=300, sk=500, hq=4, hk=2, d=64, dv=64, dtype=dtype, causal=True)
    if jax.default_backend() != "cpu":
        case = case.replace(sq=2000, sk=3000, hq=16)
    inputs = cases.make_inputs(case)
    spec = dataclasses.replace(cases.spec(case, inputs), deterministic=True)
    results = [
        jax.tree.map(
            np.asarray, cuda_call.differentiate(spec, cases.operands(inputs), inputs.dout, inputs.dlse)
        )
        for _ in range(3)
    ]
    for result in results[1:]:
        for x, y in zip(jax.tree.leaves(results[0]), jax.tree.leaves(result), strict=True):
            assert x.tobytes() == y.tobytes()


def check_large() -> None:
    """More than 2**31 elements in every operand; the last batch entry against a call of its own."""
    import jax
    import jax.numpy as jnp

    from jax_flash.spec import AttentionSpec

    spec = AttentionSpec("fixed", left=100, right=0, scale=0.1, deterministic=True)
    shape = (9, 32768, 64, 128)
    names = ("query", "key", "value", "dout")
    arrays = {
        name: jax.random.normal(key, shape, jnp.bfloat16)
        for name, key in zip(names, jax.random.split(jax.random.key(0), 4), strict=True)
    }

    def run(x: dict[str, Any]) -> Any:
        out, lse = cuda_call.call("forward", spec, x)
        delta = jnp.zeros_like(lse)
        return [out, lse, *cuda_call.call("backward", spec, x | {"lse": lse, "delta": delta})]

    last = run({name: x[-1:] for name, x in arrays.items()})
    for name, x, y in zip(("out", "lse", "dquery", "dkey", "dvalue"), run(arrays), last, strict=True):
        same = jnp.array_equal(x[-1:], y)
        assert same, f"{name} of the last entry differs"


if __name__ == "__main__":
    sys.exit(main())
