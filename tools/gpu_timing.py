"""Speed of the CUDA library's passes, beside cuDNN's where jax has it, in TFLOP/s of the whole call."""

from __future__ import annotations

import math
import time
from typing import Any

import cuda_call

TOKENS, WIDTH = 16384, 2048  # b · s, and heads · head dim
DOCUMENTS = (100, 8000, 300, 2500, 1200, 4284)  # lengths of packed sequences, TOKENS in all


def time_all() -> None:
    """bfloat16; forward 4·b·h·s²·d FLOP, half when causal, and backward 2.5 times that."""
    print(f"matmul 8192: {matmul():.0f} TFLOP/s", flush=True)
    for d in (64, 128, 256):
        for s in (1024, 4096, 16384):
            for causal in (False, True):
                _time_fixed(d, s, causal, peers=d == 128)
    for name, options in _variants().items():
        _time_fixed(128, 4096, False, name=name, **options)
    _time_fixed(128, 4096, True, name="deterministic", deterministic=True)
    for causal in (False, True):
        figures = [rate_packed(pass_, 128, DOCUMENTS, causal) for pass_ in ("forward", "backward")]
        name = f"d 128 packed documents of 100 to 8000{' causal' if causal else ''}"
        print(f"{name}: forward {figures[0]:.0f}, backward {figures[1]:.0f}", flush=True)


def _variants() -> dict[str, dict[str, Any]]:
    import jax.numpy as jnp

    return {
        "softcap": {"softcap": 20.0},
        "alibi": {"extra": {"alibi_slopes": jnp.full((1, 16), 0.1, jnp.float32)}},
        "bias": {"extra": {"bias": jnp.zeros((1, 1, 4096, 4096), jnp.bfloat16)}},
        "dropout": {"extra": {"dropout": jnp.asarray((1, 2, 0, 0, 0, 0), jnp.uint32)}, "dropout_rate": 0.1},
    }


def _time_fixed(d: int, s: int, causal: bool, *, name: str = "", peers: bool = False, **options: Any) -> None:
    figures = [rate(pass_, d, s, causal, **options) for pass_ in ("forward", "backward")]
    line = f"d {d} s {s}{' causal' if causal else ''}{' ' + name if name else ''}:"
    line += f" forward {figures[0]:.0f}, backward {figures[1]:.0f}"
    print(line + (_cudnn(d, s, causal) if peers else ""), flush=True)


def rate(
    pass_: str, d: int, s: int, causal: bool, library: str = "", *, extra: Any = None, **options: Any
) -> float:
    """TFLOP/s of one pass; `extra` are optional operands, `options` those of the spec."""
    import jax
    import jax.numpy as jnp

    from jax_flash.spec import AttentionSpec

    extra = extra or {}
    q, k, v, do = _inputs(d, s)
    spec = AttentionSpec("fixed", right=0 if causal else -1, scale=d**-0.5, operands=tuple(extra), **options)
    operands = {"query": q, "key": k, "value": v, **extra}
    if pass_ == "backward":
        lse = jnp.full((TOKENS // s, WIDTH // d, s), math.log(s), jnp.float32)
        operands |= {"dout": do, "lse": lse, "delta": jnp.zeros_like(lse)}
    call = jax.jit(lambda x: cuda_call.call(pass_, spec, x, library))
    return _flop(pass_, s, causal) / seconds(call, operands) / 1e12


def rate_packed(pass_: str, d: int, lengths: tuple[int, ...], causal: bool) -> float:
    """The same of sequences of these lengths, packed."""
    import itertools

    import jax
    import jax.numpy as jnp

    from jax_flash.spec import AttentionSpec

    q, k, v, do = (x.reshape(TOKENS, WIDTH // d, d) for x in _inputs(d, TOKENS))
    starts = jnp.asarray((0, *itertools.accumulate(lengths)), jnp.int32)
    names = ("cu_seqlens_q", "cu_seqlens_k")
    spec = AttentionSpec("varlen", right=0 if causal else -1, scale=d**-0.5, operands=names)
    operands = {"query": q, "key": k, "value": v} | dict.fromkeys(names, starts)
    if pass_ == "backward":
        lse = jnp.full((WIDTH // d, TOKENS), 8.0, jnp.float32)
        operands |= {"dout": do, "lse": lse, "delta": jnp.zeros_like(lse)}
    call = jax.jit(lambda x: cuda_call.call(pass_, spec, x))
    flop = sum(_flop(pass_, n, causal) * n / TOKENS for n in lengths)
    return flop / seconds(call, operands) / 1e12


def _inputs(d: int, s: int) -> list[Any]:
    import jax
    import jax.numpy as jnp

    shape = (TOKENS // s, s, WIDTH // d, d)
    return [jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 4)]


def _flop(pass_: str, s: int, causal: bool) -> float:
    return 4 * TOKENS * s * WIDTH * (0.5 if causal else 1) * (2.5 if pass_ == "backward" else 1)


def _cudnn(d: int, s: int, causal: bool) -> str:
    """The backward's time is that of a step less that of the forward."""
    import jax

    def call(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")

    q, k, v, do = _inputs(d, s)
    try:
        forward = seconds(jax.jit(call), q, k, v)
        both = seconds(jax.jit(lambda q, k, v, do: jax.vjp(call, q, k, v)[1](do)), q, k, v, do)
    except Exception as error:  # the peer may be missing
        return f" (cuDNN: {type(error).__name__})"
    rates = (_flop("forward", s, causal) / forward, _flop("backward", s, causal) / (both - forward))
    return f" (cuDNN {rates[0] / 1e12:.0f}, {rates[1] / 1e12:.0f})"


def matmul() -> float:
    """TFLOP/s of a bfloat16 product of 8192³."""
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    return 2 * 8192**3 / seconds(jax.jit(lambda a: a @ a), x) / 1e12


def seconds(call: Any, *arguments: Any, means: int = 4, calls: int = 8) -> float:
    """The best of some means of some calls."""
    import jax

    jax.block_until_ready(call(*arguments))
    best = float("inf")
    for _ in range(means):
        began = time.perf_counter()
        for _ in range(calls):
            out = call(*arguments)
        jax.block_until_ready(out)
        best = min(best, (time.perf_counter() - began) / calls)
    return best
