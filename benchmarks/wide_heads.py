"""Head dims above 256 compared with 256, with plain JAX and with a copy's bandwidth, on one GPU: a line for each call.

python -m benchmarks.wide_heads        the bars are in issue 38
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import jax_flash

from . import adapters, cases, decode_calls, flop, measure, peers

HEADS, WIDE, HALF = 4, 512, 256


def training(passes: tuple[str, ...] = ("forward", "backward")) -> None:
    """Rates at d 512 divided by those at d 256, with the same FLOP and 16,384 tokens."""
    for s, causal in ((4096, False), (4096, True), (16384, False), (16384, True)):
        sizes = {"b": 16384 // s, "causal": causal}
        wide, half = (
            cases.gpu_case(d, s, hq=HEADS * WIDE // d, hk=HEADS * WIDE // d, **sizes) for d in (WIDE, HALF)
        )
        named = {"d512": wide, "d256": half}
        if causal:
            named["window"] = wide.replace(window=(512, None))
        for pass_ in passes:
            calls = {
                name: peers.pass_calls(adapters.ours(case), pass_, peers.draw_inputs(case))
                for name, case in named.items()
            }
            if s == 4096:
                plain = adapters.ours(wide, implementation="xla")
                calls["plain JAX"] = peers.pass_calls(plain, pass_, peers.draw_inputs(wide))
            times = measure.in_turns(calls, repeats=5, settle=measure.SETTLED)
            rates = {
                name: flop.attention(named.get(name, wide), pass_) / times[name]["median"] for name in calls
            }
            beside = ", ".join(f"{rates['d512'] / rates[x]:.2f} of {x}'s rate" for x in calls if x != "d512")
            print(
                f"{wide.name} {pass_}: {rates['d512'] / 1e12:.0f} TFLOP/s, {beside} {measure.plus_minus(times)}",
                flush=True,
            )


def shared() -> None:
    """Time of K = V relative to separate K and V, and of 128 query heads over one KV head relative to 8 over one."""
    q, k, v = (
        jax.random.normal(x, (4, 4096, HEADS, WIDE), jnp.bfloat16)
        for x in jax.random.split(jax.random.key(0), 3)
    )
    both = jax.jit(lambda q, k: jax_flash.flash_attention(q, k, None, causal=True))
    apart = jax.jit(lambda q, k, v: jax_flash.flash_attention(q, k, v, causal=True))
    calls = {"K = V": (both, [(q, k)]), "apart": (apart, [(q, k, v)])}
    times = measure.in_turns(calls, repeats=5, settle=measure.SETTLED)
    print(f"K = V: {times['apart']['median'] / times['K = V']['median']:.3f} of the rate of separate K and V")
    rates = {}
    for heads in (8, 128):
        x = [jax.random.normal(jax.random.key(1), (1, 4096, h, WIDE), jnp.bfloat16) for h in (heads, 1)]
        time = measure.in_turns({"x": (both, [tuple(x)])}, repeats=5)["x"]["median"]
        rates[heads] = heads / time
    print(f"128 query heads over one: {rates[128] / rates[8]:.3f} of the rate of 8")


def decode() -> None:
    """The share of the device's copy bandwidth at which keys and values are read."""
    copy, arguments, copied = measure.copy_call()
    for b, hq, hk in ((64, 8, 4), (64, 64, 1)):
        shape = (b, hq, hk, WIDE, 8192)
        calls: dict[str, Any] = {"copy": (copy, arguments)}
        call, arrays = decode_calls.contiguous(jax_flash, shape)
        calls["contiguous"] = (jax.jit(call), [arrays])
        call, arrays = decode_calls.paged(jax_flash, shape, 64)
        calls["pages of 64"] = (jax.jit(call), [arrays])
        if hk == 1:
            q, k_pages, _, *where = arrays
            keys = decode_calls.draw(shape)[1]
            shared_rows = jax.jit(lambda q, k: jax_flash.flash_attention(q, k, None))
            calls["contiguous, K = V"] = (shared_rows, [(q, keys)])
            shared_pages = jax.jit(lambda q, k, *x: jax_flash.paged_attention(q, k, None, *x, value_dim=WIDE))
            calls["pages of 64, K = V"] = (shared_pages, [(q, k_pages, *where)])
        times = measure.in_turns(calls, repeats=5)
        bandwidth = copied / times["copy"]["median"]
        for name in list(calls)[1:]:
            read = flop.kv_bytes(b, hk, WIDE, 8192, 2) / (2 if "K = V" in name else 1)
            share = read / times[name]["median"] / bandwidth
            print(f"decode {b} × {hq}/{hk} × 8,192, {name}: {share:.3f} of a copy's bytes", flush=True)


if __name__ == "__main__":
    training()
    shared()
    decode()
