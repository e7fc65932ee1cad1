"""One decode step of a served model, one token for each sequence, with this library and with the paged kernel of
Pallas.

The step of examples/serving.py, scaled up, with random weights: 16 layers of width 4,096, 32 query heads of size 128
over 8 KV heads, gated MLPs of 14,336 hidden units, 64 sequences of 4,096 keys in scattered pages. One program: it
writes the new keys and values in place, attends, and takes the likeliest token.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_flash

from . import measure, peers
from .bars import Cell

REPEATS, BURST = 4, 0.1
WAYS = ("jax_flash", "no attention", "pallas")


@dataclass(frozen=True)
class Sizes:
    layers: int = 16
    width: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    hidden: int = 14336
    vocabulary: int = 32768
    sequences: int = 64
    keys: int = 4096  # of each sequence, the new one included
    page: int = 16
    dtype: str = "bfloat16"

    @property
    def pages(self) -> int:
        """Pages of a sequence."""
        return -(-self.keys // self.page)


State = tuple[list[tuple[Any, Any]], Any, Any]  # pools of each layer, the tokens, the lengths


def weights_of(sizes: Sizes) -> dict[str, Any]:
    """The embedding, and the weights of the layers, which are copies of one layer's."""
    s, d = sizes, sizes.head_dim
    shapes = {
        "q": (s.width, s.heads * d),
        "kv": (s.width, 2 * s.kv_heads * d),
        "out": (s.heads * d, s.width),
        "up": (s.width, 2 * s.hidden),
        "down": (s.hidden, s.width),
    }
    draw = jax.jit(
        lambda key, shape: jax.random.normal(key, shape, s.dtype) * shape[0] ** -0.5, static_argnums=1
    )
    keys = jax.random.split(jax.random.key(0, impl="rbg"), len(shapes) + 1)
    one = {name: draw(key, shape) for (name, shape), key in zip(shapes.items(), keys)}
    layers = [{name: jnp.copy(x) for name, x in one.items()} for _ in range(s.layers)]
    return {"layers": layers, "embed": draw(keys[-1], (s.vocabulary, s.width))}


def tables_of(sizes: Sizes) -> Any:
    order = np.random.default_rng(0).permutation(sizes.sequences * sizes.pages).astype(np.int32)
    return jnp.asarray(order.reshape(sizes.sequences, sizes.pages))


def first_state(sizes: Sizes, heads_first: bool) -> State:
    s = sizes
    shape = (s.sequences * s.pages, s.page, s.kv_heads, s.head_dim)
    if heads_first:
        shape = (s.kv_heads, *shape[:2], s.head_dim)
    pool = jax.random.normal(jax.random.key(1, impl="rbg"), shape, s.dtype)
    pools = [(jnp.copy(pool), jnp.copy(pool)) for _ in range(s.layers)]
    return pools, jnp.arange(s.sequences, dtype=jnp.int32), jnp.full(s.sequences, s.keys - 1, jnp.int32)


def norm(x: Any) -> Any:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)


def step_of(sizes: Sizes, way: str) -> Callable[..., tuple[State, Any]]:
    """(state, weights, block tables) → the state after one token of each sequence, and these tokens."""
    s = sizes
    angles = np.arange(s.keys)[:, None] * 10_000.0 ** (-np.arange(s.head_dim // 2) / (s.head_dim // 2))
    rotary = tuple(jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
    attend = {"jax_flash": ours, "no attention": nothing, "pallas": pallas}[way]

    def serving_step(state: State, weights: Any, tables: Any) -> tuple[State, Any]:
        pools, tokens, lengths = state
        x, after = weights["embed"][tokens], []
        for layer, pool in zip(weights["layers"], pools, strict=True):
            h = norm(x)
            q = (h @ layer["q"]).reshape(-1, 1, s.heads, s.head_dim)
            kv = (h @ layer["kv"]).reshape(-1, 1, 2, s.kv_heads, s.head_dim)
            q = jax_flash.apply_rotary(q, lengths[:, None], *rotary)
            pool, out = attend(pool, q, kv[:, :, 0], kv[:, :, 1], tables, lengths, rotary)
            after.append(pool)
            x = x + out.reshape(len(x), -1) @ layer["out"]
            gate, up = jnp.split(norm(x) @ layer["up"], 2, -1)
            x = x + (jax.nn.silu(gate) * up) @ layer["down"]
        chosen = jnp.argmax(norm(x) @ weights["embed"].T, -1).astype(jnp.int32)
        return (after, chosen, lengths), chosen  # the next call writes the same slots, so all steps are equal

    return serving_step


def ours(pool: Any, q: Any, k: Any, v: Any, tables: Any, lengths: Any, rotary: Any) -> tuple[Any, Any]:
    *pool, lengths = jax_flash.append_kv(*pool, k, v, tables, lengths, rotary=rotary)
    return tuple(pool), jax_flash.paged_attention(q, *pool, tables, lengths, causal=True)


def nothing(pool: Any, q: Any, k: Any, v: Any, tables: Any, lengths: Any, rotary: Any) -> tuple[Any, Any]:
    """Writes new keys without attending to them, which gives the time of the rest of the step."""
    *pool, _ = jax_flash.append_kv(*pool, k, v, tables, lengths, rotary=rotary)
    return tuple(pool), q


def pallas(pool: Any, q: Any, k: Any, v: Any, tables: Any, lengths: Any, rotary: Any) -> tuple[Any, Any]:
    """JAX's paged kernel for Triton. Its pools have the heads first, and it takes no scale, so queries are scaled here.
    Plain JAX writes the new keys."""
    from jax.experimental.pallas.ops.gpu import paged_attention as module

    k = jax_flash.apply_rotary(k, lengths[:, None], *rotary)
    size = pool[0].shape[2]
    page, slot = jnp.take_along_axis(tables, lengths[:, None] // size, 1)[:, 0], lengths % size
    new = (jnp.moveaxis(x[:, 0], 1, 0) for x in (k, v))
    pool = tuple(x.at[:, page, slot].set(rows) for x, rows in zip(pool, new, strict=True))
    scaled = (q[:, 0] * q.shape[-1] ** -0.5).astype(q.dtype)
    return pool, module.paged_attention(scaled, *pool, tables, lengths + 1)


def serving_cells(sizes: Sizes = Sizes()) -> Iterator[Cell]:
    """A decode step with each kernel, and one without attention."""
    weights, tables = weights_of(sizes), tables_of(sizes)

    captured: dict[str, Any] = {}

    def compile_one(way: str) -> peers.Finish:
        state = first_state(sizes, way == "pallas")
        lowered = jax.jit(step_of(sizes, way), donate_argnums=0).lower(state, weights, tables)
        program, captured[way] = compiled(lowered)
        return lambda: (stepping(program, state, weights, tables), [()])

    calls, refused = peers.compiled_side_by_side({way: partial(compile_one, way) for way in WAYS})
    times = measure.in_turns(calls, REPEATS, BURST)
    name = f"decode step, {sizes.sequences} sequences of {sizes.keys:,} keys"
    cell = {"kind": "serving", "name": name, "sequences": sizes.sequences, "times": times | refused}
    yield cell | {"captured": captured}


def stepping(program: Any, state: State, weights: Any, tables: Any) -> Callable[[], Any]:
    def step() -> Any:
        nonlocal state
        state, tokens = program(state, weights, tables)
        return tokens

    return step


def compiled(lowered: Any) -> tuple[Any, dict[str, int] | None]:
    """The compiled program, and captured_calls() of it."""
    if jax.default_backend() != "gpu":
        return lowered.compile(), None
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        program = lowered.compile(compiler_options=measure.PRODUCTS | options)
        found = list(Path(folder).glob("*serving_step*thunk_sequence_after_thunk_passes.txt"))
        return program, captured_calls(found[0].read_text()) if found else None


def captured_calls(sequence: str) -> dict[str, int]:
    """The numbers of thunks inside and outside of command buffers, counted in XLA's text dump of the thunk sequence."""
    counts, buffer = {"inside": 0, "outside": 0}, None
    for line in sequence.splitlines():
        if ": k" not in line:
            continue
        indentation = len(line) - len(line.lstrip())
        if buffer is not None and indentation <= buffer:
            buffer = None
        if "kCommandBuffer" in line:
            buffer = indentation
        else:
            counts["outside" if buffer is None else "inside"] += 1
    return counts


SECTIONS: dict[str, Callable[[], Iterator[Cell]]] = {"serving step": serving_cells}
