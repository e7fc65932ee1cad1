"""Speed of decode on a GPU: KV bytes over the time of a call, beside a device copy and cuDNN, in GB/s.

PYTHONPATH=. python tools/gpu_decode.py [--only paged]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_timing import seconds

from benchmarks import decode_cuda
from jax_flash import flash_attention, paged_attention

OFTEN = dict(means=3, calls=4)
SHAPES = (*decode_cuda.SHAPES, (64, 32, 8, 64, 8192), (1, 32, 8, 128, 512))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="lines whose name has this in it")
    only = parser.parse_args().only
    x = jnp.zeros(1 << 30, jnp.bfloat16)
    bandwidth = 4 * x.size / seconds(jax.jit(lambda x: x + 1), x, **OFTEN) / 1e9
    print(f"copy: {bandwidth:.0f} GB/s", flush=True)
    del x
    for shape in SHAPES:
        for name, call, arrays, share in variants(*shape):
            line = f"b{shape[0]} h{shape[1]}/{shape[2]} d{shape[3]} kv{shape[4]} {name}"
            if only in line:
                report(line, call, arrays, shape, share, bandwidth)


def report(
    name: str, call: Callable[..., Any], arrays: Any, shape: tuple[int, ...], share: float, copy: float
) -> None:
    def chain(q: jax.Array, arrays: Any) -> jax.Array:
        for _ in range(decode_cuda.CHAIN):
            q = call(q, *arrays)
        return q

    b, hq, hk, d, keys = shape
    q = jax.random.normal(jax.random.key(1), (b, 1, hq, d), jnp.bfloat16)
    try:
        each = seconds(jax.jit(chain), q, arrays, **OFTEN) / decode_cuda.CHAIN
    except Exception as error:  # a peer may refuse a shape
        print(f"{name}: {type(error).__name__} {str(error)[:100]}", flush=True)
        return
    rate = 4 * b * hk * d * keys * share / each / 1e9
    print(f"{name}: {each * 1e6:.1f} us, {rate:.0f} GB/s, {rate / copy:.2f} of copy", flush=True)


def variants(b: int, hq: int, hk: int, d: int, keys: int) -> Any:
    """(name, call of query and arrays, arrays, share of the keys that is read)."""
    k, v = (jax.random.normal(x, (b, keys, hk, d), jnp.bfloat16) for x in jax.random.split(jax.random.key(0)))
    yield "contiguous", lambda q, k, v: flash_attention(q, k, v), (k, v), 1
    yield "cuDNN", lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation="cudnn"), (k, v), 1
    for size in (1, 16, 64) if keys == 8192 else (16,):
        count = b * keys // size
        order = np.random.default_rng(0).permutation(count).astype(np.int32)
        pools = [x.reshape(count, size, hk, d) for x in (k, v)]
        tables, lengths = jnp.asarray(order.reshape(b, -1)), jnp.full(b, keys, jnp.int32)
        yield f"paged {size}", paged_attention, (*pools, tables, lengths), 1
    if keys == 8192:
        yield "packed", packed, (*pools, tables, lengths), 1
        yield "batch invariant", invariant, (*pools, tables, lengths), 1
        ragged = np.exp(np.random.default_rng(1).uniform(np.log(16), np.log(keys), b)).astype(np.int32)
        yield "ragged", paged_attention, (*pools, tables, jnp.asarray(ragged)), ragged.mean() / keys


def packed(q: jax.Array, *arguments: jax.Array) -> jax.Array:
    starts = jnp.arange(q.shape[0] + 1, dtype=jnp.int32)
    out: jax.Array = paged_attention(q[:, 0], *arguments, cu_seqlens_q=starts)
    return out[:, None]


def invariant(*arguments: jax.Array) -> jax.Array:
    out: jax.Array = paged_attention(*arguments, batch_invariant=True)
    return out


if __name__ == "__main__":
    main()
