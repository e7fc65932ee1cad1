"""Builds the CUDA library alone, calls its forward through jax.ffi, and holds it against the equations in JAX.

    python3 tools/gpu_check.py                on a machine with a GPU: build, check everything, time d = 128
    python3 tools/gpu_check.py --emulated     on any machine: the same kernels on tools/emulator, small cases

Needs cmake, a C++20 compiler, jax, and nvcc unless emulated; nothing is installed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import cuda_call  # noqa: E402

HEAD_DIMS = ((32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
PADDED_HEAD_DIMS = ((8, 8), (40, 40), (64, 24), (72, 128), (160, 112), (224, 224))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--emulated", action="store_true", help="run the kernels on the host")
    parser.add_argument("--library", type=Path, help="a library built before")
    parser.add_argument("--archs", default="90a-real", help="JAX_FLASH_CUDA_ARCHS of the build")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--no-timing", action="store_true")
    parser.add_argument(
        "--command-buffers", action="store_true", help="let XLA capture every call in a graph"
    )
    options = parser.parse_args()
    if options.command_buffers:
        flags = "--xla_gpu_graph_min_graph_size=1 --xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUSTOM_CALL"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    if options.emulated:
        os.environ["JAX_PLATFORMS"] = "cpu"
    library = options.library or (
        cuda_call.build_emulated() if options.emulated else cuda_call.build(options.archs)
    )
    cuda_call.register(library, "cpu" if options.emulated else "CUDA")
    failures = run_checks(options)
    if not options.emulated and not options.no_timing:
        time_d128()
    print(f"{failures} failed" if failures else "all passed")
    return int(failures > 0)


# --- the checks ----------------------------------------------------------------------------------------------------


def run_checks(options: argparse.Namespace) -> int:
    checks = [*named_cases(options.emulated), *more_cases(options.emulated)]
    others = [
        ("leading dimensions", check_leading),
        ("garbage cu_seqlens", check_garbage),
        ("several calls in one program", check_program),
    ]
    if not options.emulated:
        others.append(("offsets beyond 2**31", check_large))
    failed = []
    for name, run in [*((case.name, lambda case=case: check_case(case)) for case in checks), *others]:
        if options.only not in name:
            continue
        began = time.time()
        try:
            run()
            verdict = "ok"
        except AssertionError as error:
            verdict = f"FAILED {error}"
            failed.append(name)
        print(f"{name}: {verdict} ({time.time() - began:.1f} s)", flush=True)
    return len(failed)


def named_cases(emulated: bool) -> list[Any]:
    """The cases of the test suite, in 16-bit and with head dims that need no copy."""
    from cases import CASES

    made = []
    for i, case in enumerate(CASES):
        sizes = {"d": -(-case.d // 8) * 8, "dv": -(-case.dv // 8) * 8}
        for j, dtype in enumerate(("bfloat16", "float16")):
            if not emulated or i % 2 == j:
                made.append(case.replace(dtype=dtype, name=f"{case.name}, {dtype}", **sizes))
    return made


def more_cases(emulated: bool) -> list[Any]:
    """Every head dim, and every option over several tiles of queries and keys."""
    from cases import Case, varlen

    sq, sk = (150, 170) if emulated else (300, 1100)
    few = {"b": 1, "hq": 2, "hk": 1}
    made = []
    for d, dv in HEAD_DIMS + PADDED_HEAD_DIMS:
        for dtype in ("bfloat16",) if emulated else ("bfloat16", "float16"):
            name = f"d {d}/{dv}, {dtype}"
            made.append(Case(name, sq=sq, sk=sk, d=d, dv=dv, dtype=dtype, causal=True, **few))
            if not emulated:
                general = {"softcap": 5.0, "bias": (1, 2, sq, sk), "dropout_rate": 0.2, "window": (200, 50)}
                made.append(Case(f"general {name}", sq=sq, sk=sk, d=d, dv=dv, dtype=dtype, **general, **few))
    size = {"sq": sq, "sk": sk, "d": 64, "dv": 64, "dtype": "bfloat16", **few}
    lengths = {"q_lengths": (sq - 7,), "kv_lengths": (sk - 20,)}
    made += [
        Case("large plain", **size),
        Case("large window", window=(40, 3), **size),
        Case("large top left", causal=True, align="top_left", **size),
        Case("large lengths", causal=True, **lengths, **size),
        Case("large mask", mask=(1, 2, sq, sk), **size),
        Case("large bias", bias=(1, 1, sq, sk), bias_dtype="float16", **size),
        Case("large segments", segments=5, **size),
        Case("large alibi", alibi_slopes=(2,), causal=True, **size),
        Case("large dropout", dropout_rate=0.4, **size),
        Case("large scale 0", scale=0.0, sinks=True, **size),
        Case("large negative scale", scale=-0.3, **size),
    ]
    packed = {"hq": 4, "hk": 2, "d": 64, "dv": 64, "dtype": "bfloat16", "causal": True}
    made += [
        varlen(
            "large packed", (130, 1, 0, 200, 64), k_sequences=(150, 3, 9, 170, 64), padding=(70, 3), **packed
        ),
        varlen("many sequences", tuple(i % 5 for i in range(600)), **packed),
        varlen("no sequence", (), padding=(140, 20), **packed),
    ]
    return made


def check_case(case: Any) -> None:
    import cases

    inputs = cases.make_inputs(case)
    check(cases.spec(case, inputs), cases.operands(cases.poisoned(case, inputs)), case.softcap)


def check(spec: Any, operands: dict[str, Any], softcap: Any = None, leading: tuple[int, ...] = ()) -> None:
    """out and lse of the custom call at the contract's tolerance."""
    import jax.numpy as jnp
    import numpy as np

    from jax_flash import reference

    def wide(x: Any) -> Any:
        return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x

    run = reference.attention
    out, lse = (np.asarray(x, np.float32) for x in cuda_call.forward(spec, operands, leading))
    dtype = operands["query"].dtype
    operands = {name: jnp.broadcast_to(x, leading + x.shape[len(leading) :]) for name, x in operands.items()}
    ref = _over(leading, run, spec, {name: wide(x) for name, x in operands.items()})
    low = _over(leading, run, spec, operands, round_to=dtype)[0]
    right, ref_lse = (np.asarray(x, np.float32) for x in ref)
    if out.size == 0:
        return
    assert np.isfinite(out).all(), f"out: {np.count_nonzero(~np.isfinite(out))} of {out.size} are not finite"
    limit = (3 if softcap else 2) * np.abs(np.asarray(low, np.float32) - right).max() + 1e-5
    error = np.abs(out - right)
    worst = np.unravel_index(error.argmax(), error.shape)
    assert error.max() <= limit, f"out: {error.max():.2e} at {worst}, allowed {limit:.2e}"
    nothing = np.isneginf(ref_lse)
    assert (np.isneginf(lse) == nothing).all(), "lse: −inf at other rows"
    error = np.where(nothing, 0, np.abs(np.where(nothing, 0, lse) - np.where(nothing, 0, ref_lse)))
    limit = 1e-4 + 1e-5 * np.abs(np.where(nothing, 0, ref_lse))
    assert (error <= limit).all(), (
        f"lse: {error.max():.2e} at {np.unravel_index(error.argmax(), error.shape)}"
    )


def _over(leading: tuple[int, ...], run: Any, spec: Any, operands: dict[str, Any], **options: Any) -> Any:
    import jax

    call = lambda x: run(spec, x, **options)  # noqa: E731
    for _ in leading:
        call = jax.vmap(call)
    return call(operands)


def check_leading() -> None:
    """Two leading dimensions; one operand has each of them whole, another 1."""
    import cases
    import jax.numpy as jnp

    for name in ("everything", "packed everything"):
        case = cases.BY_NAME[name].replace(dtype="bfloat16")
        inputs = cases.make_inputs(case)
        many = [cases.operands(cases.make_inputs(case, seed)) for seed in range(6)]
        stacked = {n: jnp.stack([x[n] for x in many]).reshape(2, 3, *many[0][n].shape) for n in many[0]}
        whole_in = {
            "key": (slice(0, 1), slice(None)),
            "sinks": (slice(None), slice(0, 1)),
            "query": (slice(None),) * 2,
        }
        nowhere = (slice(0, 1), slice(0, 1))
        operands = {n: x[whole_in.get(n, nowhere)] for n, x in stacked.items()}
        check(cases.spec(case, inputs), operands, case.softcap, leading=(2, 3))


def check_garbage() -> None:
    """cu_seqlens of any values are read as their running maximum within the operand."""
    import cases
    import jax.numpy as jnp
    import numpy as np

    case = cases.BY_NAME["packed causal, other keys"].replace(dtype="bfloat16")
    inputs = cases.make_inputs(case)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        garbage = {
            name: jnp.asarray(rng.integers(-20, 40, 4), jnp.int32)
            for name in ("cu_seqlens_q", "cu_seqlens_k")
        }
        garbage["cu_seqlens_k"] = garbage["cu_seqlens_k"].at[3].set(2**31 - 1)
        check(cases.spec(case, inputs), cases.operands(inputs) | garbage)


def check_program() -> None:
    """Fixed and packed calls that feed each other in one jitted program, run again with other values."""
    import cases
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jax_flash import reference

    fixed, packed = (cases.BY_NAME[name].replace(dtype="bfloat16") for name in ("causal", "packed causal"))
    specs = [cases.spec(case, cases.make_inputs(case)) for case in (fixed, packed)]

    def program(call: Any, a: dict[str, Any], b: dict[str, Any]) -> Any:
        for _ in range(3):
            a = a | {"query": call(specs[0], a)[0] + a["query"]}
            b = b | {
                "query": call(specs[1], b)[0]
                + a["query"].reshape(-1, *b["query"].shape[1:])[: len(b["query"])]
            }
        return b["query"]

    ours, right = (
        jax.jit(lambda a, b, call=call: program(call, a, b))
        for call in (cuda_call.forward_into, reference.attention)
    )
    for seed in range(3):
        operands = [cases.operands(cases.make_inputs(case, seed)) for case in (fixed, packed)]
        got, wanted = (np.asarray(call(*operands), np.float32) for call in (ours, right))
        # Six roundings of 2⁻⁸ follow one another on values of a few units.
        assert np.abs(got - wanted).max() <= 0.1, f"out: {np.abs(got - wanted).max()}"
        assert jnp.isfinite(got).all()


def check_large() -> None:
    """More than 2**31 elements in every operand; the last batch entry against a call of its own."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jax_flash.spec import AttentionSpec

    spec = AttentionSpec("fixed", left=100, right=0, scale=0.1)
    shape = (9, 32768, 64, 128)
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = {
        n: jax.random.normal(k, shape, jnp.bfloat16)
        for n, k in zip(("query", "key", "value"), keys, strict=True)
    }
    out, lse = cuda_call.forward(spec, arrays)
    last = {n: x[-1:] for n, x in arrays.items()}
    alone = cuda_call.forward(spec, last)
    assert np.array_equal(out[-1:].view(jnp.uint16), alone[0].view(jnp.uint16)), (
        "out of the last entry differs"
    )
    assert np.array_equal(lse[-1:], alone[1]), "lse of the last entry differs"
    small = {n: x[:, -2048:, :2] for n, x in last.items()}
    part = cuda_call.forward(spec, small)[0][:, 101:]
    assert np.array_equal(part.view(jnp.uint16), out[-1:, -1947:, :2].view(jnp.uint16)), (
        "out of the last rows differs"
    )


# --- speed ---------------------------------------------------------------------------------------------------------


def time_d128() -> None:
    """TFLOP/s of the whole call at 16,384 tokens, 16 heads of 128, beside cuDNN's where jax has it."""
    import jax
    import jax.numpy as jnp

    from jax_flash.spec import AttentionSpec

    for s in (1024, 4096, 16384):
        shape = (16384 // s, s, 16, 128)
        q, k, v = (
            jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 3)
        )
        for causal in (False, True):
            flop = 4 * 16384 * s * 16 * 128 / (2 if causal else 1)
            spec = AttentionSpec("fixed", right=0 if causal else -1, scale=128**-0.5)
            ours = jax.jit(
                lambda q, k, v, spec=spec: cuda_call.forward_into(spec, {"query": q, "key": k, "value": v})[0]
            )
            peer = jax.jit(
                lambda q, k, v, causal=causal: jax.nn.dot_product_attention(
                    q, k, v, is_causal=causal, implementation="cudnn"
                )
            )
            figures = []
            for call in (ours, peer):
                try:
                    figures.append(f"{flop / seconds(call, q, k, v) / 1e12:.0f}")
                except Exception as error:  # the peer may be missing
                    figures.append(type(error).__name__)
            print(f"s {s}{' causal' if causal else ''}: {figures[0]} TFLOP/s, cuDNN {figures[1]}", flush=True)


def seconds(call: Any, *arguments: Any) -> float:
    """The best of five means of ten calls."""
    call(*arguments).block_until_ready()
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(10):
            out = call(*arguments)
        out.block_until_ready()
        best = min(best, (time.perf_counter() - began) / 10)
    return best


if __name__ == "__main__":
    sys.exit(main())
