"""Speed of the CUDA library's passes, beside cuDNN's where jax has it, in TFLOP/s of the whole call."""

from __future__ import annotations

import time
from typing import Any

import cuda_call

TOKENS, WIDTH = 16384, 2048  # b · s, and heads · head dim


def time_all() -> None:
    """bfloat16; forward 4·b·h·s²·d FLOP, half when causal, and backward 2.5 times that."""
    print(f"matmul 8192: {_matmul():.0f} TFLOP/s", flush=True)
    for d in (64, 128, 256):
        for s in (1024, 4096, 16384):
            for causal in (False, True):
                _time_fixed(d, s, causal, peers=d == 128)
    for name, options in _variants().items():
        _time_fixed(128, 4096, False, name=name, **options)
    _time_fixed(128, 4096, True, name="deterministic", deterministic=True)


def _variants() -> dict[str, dict[str, Any]]:
    import jax.numpy as jnp

    return {
        "softcap": {"softcap": 20.0},
        "alibi": {"extra": {"alibi_slopes": jnp.full((1, 16), 0.1, jnp.float32)}},
        "bias": {"extra": {"bias": jnp.zeros((1, 1, 4096, 4096), jnp.bfloat16)}},
        "dropout": {"extra": {"dropout": jnp.arange(6, dtype=jnp.uint32)}, "dropout_rate": 0.1},
    }


def _time_fixed(
    d: int, s: int, causal: bool, *, name: str = "", peers: bool = False, extra: Any = None, **options: Any
) -> None:
    import jax
    import jax.numpy as jnp

    from jax_flash.spec import AttentionSpec

    shape = (TOKENS // s, s, WIDTH // d, d)
    q, k, v, do = (
        jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 4)
    )
    extra = extra or {}
    spec = AttentionSpec("fixed", right=0 if causal else -1, scale=d**-0.5, operands=tuple(extra), **options)
    operands = {"query": q, "key": k, "value": v, **extra}
    forward = jax.jit(lambda x: cuda_call.call("forward", spec, x))
    backward = jax.jit(lambda x: cuda_call.call("backward", spec, x))
    out, lse = forward(operands)
    delta = jnp.swapaxes((do.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1), 1, 2)
    flop = 4 * TOKENS * s * WIDTH / (2 if causal else 1) / 1e12
    line = f"d {d} s {s}{' causal' if causal else ''} {name}:".replace(" :", ":")
    line += f" forward {flop / seconds(forward, operands):.0f}"
    line += f", backward {2.5 * flop / seconds(backward, operands | {'dout': do, 'lse': lse, 'delta': delta}):.0f}"
    if peers:
        line += _cudnn(q, k, v, do, causal, flop)
    print(line, flush=True)


def _cudnn(q: Any, k: Any, v: Any, do: Any, causal: bool, flop: float) -> str:
    """The backward's time is that of a step less that of the forward."""
    import jax

    def call(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")

    try:
        forward = seconds(jax.jit(call), q, k, v)
        both = seconds(jax.jit(lambda q, k, v, do: jax.vjp(call, q, k, v)[1](do)), q, k, v, do)
    except Exception as error:  # the peer may be missing
        return f" (cuDNN: {type(error).__name__})"
    return f" (cuDNN {flop / forward:.0f}, {2.5 * flop / (both - forward):.0f})"


def _matmul() -> float:
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    return 2 * 8192**3 / seconds(jax.jit(lambda a: a @ a), x) / 1e12


def seconds(call: Any, *arguments: Any) -> float:
    """The best of four means of eight calls."""
    import jax

    jax.block_until_ready(call(*arguments))
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        for _ in range(8):
            out = call(*arguments)
        jax.block_until_ready(out)
        best = min(best, (time.perf_counter() - began) / 8)
    return best
