"""Training steps of Flax decoders that differ only in their attention: this library, cuDNN and plain JAX.

The model: RMSNorm, rotary positions, grouped heads, a squared ReLU between the MLP's two products, one scan over layers
that are recomputed in the backward pass (remat), bytes as its vocabulary, AdamW on float32 weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_flash

from . import measure, peers
from .bars import Cell

REPEATS, BURST = 3, 0.25
DOCUMENT = 1500  # tokens of a document on average
KEEP = ("flash_out", "flash_lse")

Attend = Callable[..., Any]  # (q, k, v, offsets of documents, sinks, window) → out


@dataclass(frozen=True)
class Sizes:
    """A decoder; layers cycle through `windows`, where None is a layer that sees all tokens before it."""

    width: int = 2048
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 128
    hidden: int = 8192
    layers: int = 8
    windows: tuple[int | None, ...] = (None,)
    sinks: bool = False
    vocabulary: int = 256


DECODER = Sizes()
GPT_OSS = Sizes(width=2880, heads=64, kv_heads=8, head_dim=64, hidden=11520, windows=(128, None), sinks=True)


# --- attention --------------------------------------------------------------------------------------------------------


def ours(q: Any, k: Any, v: Any, offsets: Any, sinks: Any, window: Any, **options: Any) -> Any:
    band = None if window is None else (window - 1, 0)
    return jax_flash.flash_attention(q, k, v, causal=True, window=band, sinks=sinks, **options)


def ours_packed(q: Any, k: Any, v: Any, offsets: Any, sinks: Any, window: Any) -> Any:
    """All rows as one packed row of documents, each of which attends only to itself."""
    band = None if window is None else (window - 1, 0)
    rows = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    out = jax_flash.flash_attention_varlen(*rows, offsets, causal=True, window=band, sinks=sinks)
    return out.reshape(*q.shape[:-1], v.shape[-1])


def cudnn(q: Any, k: Any, v: Any, offsets: Any, sinks: Any, window: Any) -> Any:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


# name → attention, and whether remat keeps attention's results
WAYS: Mapping[str, tuple[Attend, bool]] = {
    "jax_flash": (ours, False),
    "jax_flash, results kept": (ours, True),
    "cudnn": (cudnn, False),
    "jax_flash, documents": (ours_packed, False),
    "xla": (partial(ours, implementation="xla"), False),
}


# --- the model --------------------------------------------------------------------------------------------------------


def make_model(sizes: Sizes, attend: Attend, keep: bool) -> Any:
    """A Flax module: tokens [r, t] and offsets of documents → float32 logits."""
    import flax.linen as nn

    dense = partial(nn.DenseGeneral, use_bias=False, dtype=jnp.bfloat16)

    class Layer(nn.Module):
        window: int | None

        @nn.compact
        def __call__(self, x: Any, offsets: Any) -> Any:
            h = nn.RMSNorm(dtype=jnp.bfloat16)(x)
            q, k, v = (
                dense((heads, sizes.head_dim), name=name)(h)
                for name, heads in (("q", sizes.heads), ("k", sizes.kv_heads), ("v", sizes.kv_heads))
            )
            sinks = self.param("sinks", nn.initializers.zeros, (sizes.heads,)) if sizes.sinks else None
            out = attend(rotate(q), rotate(k), v, offsets, sinks, self.window)
            x = x + dense(sizes.width, axis=(-2, -1), name="out")(out)
            h = dense(sizes.hidden, name="up")(nn.RMSNorm(dtype=jnp.bfloat16)(x))
            return x + dense(sizes.width, name="down")(jnp.square(nn.relu(h)))

    policy = jax.checkpoint_policies.save_only_these_names(*KEEP) if keep else None
    recomputed = nn.remat(Layer, policy=policy, prevent_cse=False)

    class Group(nn.Module):
        """A layer for each of the windows."""

        @nn.compact
        def __call__(self, x: Any, offsets: Any) -> Any:
            for number, window in enumerate(sizes.windows):
                x = recomputed(window, name=f"layer{number}")(x, offsets)
            return x, None

    class Decoder(nn.Module):
        @nn.compact
        def __call__(self, tokens: Any, offsets: Any) -> Any:
            x = nn.Embed(sizes.vocabulary, sizes.width, dtype=jnp.bfloat16)(tokens)
            stack = nn.scan(
                Group,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=sizes.layers // len(sizes.windows),
                in_axes=nn.broadcast,
            )
            x, _ = stack()(x, offsets)
            logits: Any = dense(sizes.vocabulary, name="head")(nn.RMSNorm(dtype=jnp.bfloat16)(x))
            return logits.astype(jnp.float32)

    return Decoder()


def rotate(x: Any) -> Any:
    """Rotary positions of x [r, t, h, d]."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None, None] * 10_000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    x1, x2 = x[..., :half], x[..., half:]
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)


# --- steps ------------------------------------------------------------------------------------------------------------


def batch_of(rows: int, length: int, vocabulary: int) -> tuple[Any, Any]:
    """Random tokens [r, t + 1], and the offsets of documents; the last document of a row ends with it."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocabulary, (rows, length + 1), dtype=np.int32)
    cuts = rng.choice(rows * length, max(1, rows * length // DOCUMENT), replace=False)
    ends = np.unique(np.concatenate([cuts, np.arange(rows + 1) * length]))
    return jnp.asarray(tokens), jnp.asarray(ends, jnp.int32)


def lowered_step(sizes: Sizes, way: str, rows: int, length: int) -> tuple[Any, Callable[[], Any], Any]:
    """The lowered step, a function that makes its first state, and its batch."""
    import optax

    model, optimizer = make_model(sizes, *WAYS[way]), optax.adamw(1e-3, b2=0.98)
    tokens, offsets = batch_of(rows, length, sizes.vocabulary)

    def create() -> Any:
        weights = model.init(jax.random.key(0, impl="rbg"), tokens[:, :8], jnp.array([0, rows * 8]))
        return weights, optimizer.init(weights)

    def serial_loss(weights: Any, tokens: Any, offsets: Any) -> Any:
        logits = model.apply(weights, tokens[:, :-1], offsets)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def step(state: Any, tokens: Any, offsets: Any) -> Any:
        weights, moments = state
        loss, gradients = jax.value_and_grad(serial_loss)(weights, tokens, offsets)
        updates, moments = optimizer.update(gradients, moments, weights)
        return (optax.apply_updates(weights, updates), moments), loss

    state = jax.eval_shape(create)
    return jax.jit(step, donate_argnums=0).lower(state, tokens, offsets), jax.jit(create), (tokens, offsets)


def steps(
    sizes: Sizes, ways: tuple[str, ...], rows: int, length: int
) -> tuple[measure.Calls, dict[str, Any]]:
    """name → a call that makes one step from the last state; and the reasons of those that do not run."""

    def compile_one(way: str) -> peers.Finish:
        lowered, create, batch = lowered_step(sizes, way, rows, length)
        program, first_state = compiled(lowered), create.lower().compile()
        return lambda: (stepping(program, first_state(), batch), [()])

    return peers.compiled_side_by_side({way: partial(compile_one, way) for way in ways})


def compiled(lowered: Any) -> Any:
    return lowered.compile(compiler_options=measure.PRODUCTS if jax.default_backend() == "gpu" else None)


def stepping(program: Any, state: Any, batch: Any) -> Callable[[], Any]:
    def step() -> Any:
        nonlocal state
        state, loss = program(state, *batch)
        return loss

    return step


def step_cell(name: str, sizes: Sizes, ways: tuple[str, ...], rows: int, length: int, **tags: Any) -> Cell:
    calls, refused = steps(sizes, ways, rows, length)
    times = measure.in_turns(calls, REPEATS, BURST) | refused
    return {"kind": "step", "name": name, "tokens": rows * length, "times": times} | tags


def decoder_cells(sizes: Sizes = DECODER, short: int = 8192, long: int = 32768) -> Iterator[Cell]:
    """16 query heads of size 128 over 4 KV heads, with a causal mask; documents are packed by this library only."""
    ways = ("jax_flash", "cudnn", "jax_flash, results kept")
    yield step_cell(f"1 × {long:,}", sizes, ways, 1, long, of="decoder")
    yield step_cell(f"2 × {short:,}", sizes, (*ways, "jax_flash, documents"), 2, short, of="decoder")


def gpt_oss_cells(sizes: Sizes = GPT_OSS, short: int = 4096, long: int = 8192) -> Iterator[Cell]:
    """64 query heads of size 64 over 8 KV heads, sinks, alternating layers with a window of 128 keys and without one;
    plain JAX where its scores fit."""
    yield step_cell(f"gpt-oss-like, 1 × {short:,}", sizes, ("jax_flash", "xla"), 1, short, of="gpt-oss")
    yield step_cell(f"gpt-oss-like, 2 × {long:,}", sizes, ("jax_flash",), 2, long, of="gpt-oss")


SECTIONS: dict[str, Callable[[], Iterator[Cell]]] = {
    "training step": decoder_cells,
    "gpt-oss step": gpt_oss_cells,
}
