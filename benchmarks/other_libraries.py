"""Models and pools of other libraries that run here, compared with their usual attention or layout, on one GPU.

python -m benchmarks.other_libraries [pool] [sglang] [maxtext]        the bars are in issue 39

pool: decode from pages of K0 V0 K1 V1 …, read in place, and from separate pools of keys and of values. sglang: a decode
step of sglang-jax's Llama through compat.ragged_paged_attention, and of examples/models with the same weights. maxtext:
a training step of MaxText's default configuration, with compat.maxtext and with cuDNN's attention. The last two need
sglang-jax 0.0.2 and MaxText 0.2.5 with what their models import (tools/libraries/pins.toml).
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core.spmd import logical_axis_rules

import jax_flash
from jax_flash.compat.ragged_paged_attention import ragged_paged_attention

from . import decode_calls, measure, step_serving
from .step_serving import Sizes

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]


def off(ours: Any, theirs: Any) -> float:
    """The largest |ours − theirs| / (1 + |theirs|)."""
    a, b = (np.asarray(x, np.float64) for x in (ours, theirs))
    return float((np.abs(a - b) / (1 + np.abs(b))).max())


# -- pool ------------------------------------------------------------------------------------------------------------


def pool(shape: tuple[int, ...] = (64, 32, 8, 128, 8192), sizes: tuple[int, ...] = (64, 16)) -> None:
    """One query token of each sequence: sequences, query and KV heads, head dim and keys are `shape`."""
    b, hq, hk, d, keys = shape
    starts = jnp.arange(b + 1, dtype=jnp.int32)
    for size in sizes:
        apart, (q, k, v, *where) = decode_calls.paged(jax_flash, shape, size)
        both = jnp.stack((k, v), 3).reshape(*k.shape[:2], 2 * hk, d)

        def interleaved(q: Any, both: Any, *where: Any) -> Any:
            heads = both.reshape(*both.shape[:2], hk, 2 * d)
            return jax_flash.paged_attention(q, heads, None, *where, value_dim=d, value_start=d)

        def adapter(q: Any, both: Any, tables: Any, lengths: Any) -> Any:
            named = dict(sm_scale=d**-0.5)
            return ragged_paged_attention(q[:, 0], both, lengths, tables, starts, b, **named)[:, None]

        packed, _ = decode_calls.packed(jax_flash, shape)
        calls = {
            "separate": (apart, (q, k, v, *where)),
            "interleaved": (interleaved, (q, both, *where)),
            "separate, packed": (packed, (q, k, v, *where)),
            "ragged_paged_attention": (adapter, (q, both, *where)),
        }
        expected = first_rows(q, k, v, where[0])
        for name, (call, arrays) in calls.items():
            worst = off(jax.jit(call)(*arrays)[: len(expected)], expected)
            assert worst < 2e-2, f"{name} is {worst:.1e} off"
        chained = {name: decode_calls.chained(call) for name, call in calls.items()}
        times = measure.of_one(measure.in_turns(chained, settle=measure.SETTLED), decode_calls.CHAIN)
        time = {name: each["median"] for name, each in times.items()}
        print(
            f"pool: decode {b} × {hq}/{hk} d{d} of {keys:,} keys in pages of {size}: {1e6 * time['separate']:.0f} µs; "
            f"interleaved {time['separate'] / time['interleaved']:.3f} of the rate of separate pools; packed, "
            f"ragged_paged_attention {time['separate, packed'] / time['ragged_paged_attention']:.3f} "
            f"{measure.plus_minus(times)}",
            flush=True,
        )


def first_rows(q: Any, k: Any, v: Any, tables: Any) -> Any:
    """The results of the first two sequences in float32, by plain JAX."""
    count = 2
    rows = [x[tables[:count]].reshape(count, -1, *x.shape[2:]).astype(jnp.float32) for x in (k, v)]
    return jax_flash.flash_attention(q[:count].astype(jnp.float32), *rows, implementation="xla")


# -- sglang-jax ------------------------------------------------------------------------------------------------------


SERVED = Sizes(layers=8)


def sglang(sizes: Sizes = SERVED) -> None:
    """One token of each sequence. The weights are the same arrays in both models."""
    mesh = jax.make_mesh(
        (1, 1), ("data", "tensor"), (jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:1]
    )
    with jax.set_mesh(mesh):
        tiny = Sizes(2, 64, 4, 2, 16, 96, 128, sequences=3, keys=48, page=16, dtype="float32")
        with jax.default_matmul_precision("highest"):
            logits = [jax.jit(step)(*given)[1] for step, given in (our_step(tiny), their_step(tiny, mesh))]
        assert off(*logits) < 1e-4, f"logits are {off(*logits):.1e} off"
        made = {"examples/models": our_step(sizes), "sglang-jax": their_step(sizes, mesh)}
        lowered = [
            jax.jit(partial(serving_step, step), donate_argnums=0).lower(*given)
            for step, given in made.values()
        ]
        with ThreadPoolExecutor() as pool:
            programs = dict(zip(made, pool.map(step_serving.compiled, lowered), strict=True))
        calls = {
            name: (step_serving.stepping(programs[name][0], *given), [()])
            for name, (_, given) in made.items()
        }
        captured = {name: thunks for name, (_, thunks) in programs.items()}
        del made
        times = measure.in_turns(calls, settle=measure.SETTLED)
    ours, theirs = (times[name]["median"] for name in calls)
    print(
        f"sglang: a decode step of {sizes.sequences} × {sizes.keys:,} keys, {sizes.layers} layers: {1e3 * ours:.2f} ms "
        f"for examples/models, {1e3 * theirs:.2f} for sglang-jax: {ours / theirs:.3f} of its rate "
        f"{measure.plus_minus(times)}; thunks {captured}",
        flush=True,
    )


def serving_step(step: Callable[..., Any], state: Any, *rest: Any) -> Any:
    """A step that takes the likeliest tokens, as generate.py does at temperature 0."""
    (pools, _), logits = step(state, *rest)
    tokens = jnp.argmax(logits, -1).astype(jnp.int32)
    return (pools, tokens), tokens


def llama(sizes: Sizes) -> tuple[Any, dict[tuple[Any, ...], Any], dict[str, Any]]:
    """The graph of Llama 3 of examples/models, its random weights, and the same by the names of a checkpoint."""
    from models.checkpoint import tensor_names
    from models.config import Config
    from models.llama3 import Llama3

    s = sizes
    config = Config(
        vocab_size=s.vocabulary, hidden_size=s.width, intermediate_size=s.hidden, num_hidden_layers=s.layers,
        num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, head_dim=s.head_dim, dtype=s.dtype,
        max_position_embeddings=s.keys, rope_parameters={"rope_theta": 1e4}, tie_word_embeddings=True,
    )  # fmt: skip
    model = nnx.eval_shape(lambda: Llama3(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    names, flat = tensor_names(model), nnx.to_flat_state(state)
    arrays = {path: drawn(i, x.shape, s.dtype) for i, (path, x) in enumerate(flat)}
    weights = nnx.from_flat_state([(path, x.replace(arrays[path])) for path, x in flat])
    return graph, weights, {name: arrays[path] for path, name in names.items()}


@partial(jax.jit, static_argnums=(1, 2))
def drawn(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """The weights of a product, of standard deviation 1 / √inputs, or those of a norm, which are 1."""
    if len(shape) == 1:
        return jnp.ones(shape, dtype)
    return jax.random.normal(jax.random.key(seed, impl="rbg"), shape, dtype) * shape[0] ** -0.5


def caches(sizes: Sizes) -> tuple[jax.Array, jax.Array]:
    """Keys and values of all layers, [layers · pages, page, heads, dim]."""
    shape = (sizes.layers * sizes.sequences * sizes.pages, sizes.page, sizes.kv_heads, sizes.head_dim)
    keys = (jax.random.key(seed, impl="rbg") for seed in (1, 2))
    k, v = (jax.random.normal(key, shape, sizes.dtype) for key in keys)
    return k, v


def our_step(sizes: Sizes) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """((pools, tokens), weights, batch) → ((pools, tokens), logits), as `generate.py --model` makes a step."""
    from models.cache import PagedCache, Pool
    from scheduler import Batch

    graph, weights, _ = llama(sizes)
    shapes, count = nnx.merge(graph, weights).kv_shapes, sizes.sequences
    last = jnp.full(count, sizes.keys - 1, jnp.int32)
    number = jnp.arange(count + 1, dtype=jnp.int32)
    batch = Batch(None, last, number, step_serving.tables_of(sizes), last, number[:-1])

    def step(state: Any, weights: Any, batch: Any) -> Any:
        pools, tokens = state
        cache = PagedCache(shapes, pools, batch)
        logits = nnx.merge(graph, weights)(tokens, cache)
        return (cache.pools, tokens), logits

    return step, (([Pool(*caches(sizes))], number[:-1]), weights, batch)


class Static(types.SimpleNamespace):
    """A configuration that jit can compare by its identity."""

    __hash__ = object.__hash__


def their_step(sizes: Sizes, mesh: jax.sharding.Mesh) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What `our_step` returns, for sglang-jax's LlamaForCausalLM with its backend and its pool of pages."""
    from tools.libraries.sglang_jax import runs_here, stub

    attention, memory_pool = runs_here()
    stub("sgl_jax.srt.configs.model_config", ModelConfig=object)
    from sgl_jax.srt.layers.logits_processor import LogitsMetadata
    from sgl_jax.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
    from sgl_jax.srt.models.llama import LlamaForCausalLM

    s, count = sizes, sizes.sequences
    config = Static(
        vocab_size=s.vocabulary, hidden_size=s.width, intermediate_size=s.hidden, num_hidden_layers=s.layers,
        num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, head_dim=s.head_dim, rms_norm_eps=1e-6,
        max_position_embeddings=s.keys, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    model = nnx.eval_shape(lambda: LlamaForCausalLM(config, jnp.dtype(s.dtype), nnx.Rngs(0), mesh))
    graph, state = nnx.split(model)
    tensors = llama(sizes)[2]
    targets = {x.target_path: tensors[name] for name, x in model._create_llama_weight_mappings().items()}
    flat = [(path, x.replace(targets[".".join(map(str, path))])) for path, x in nnx.to_flat_state(state)]

    pool = memory_pool.MHATokenToKVPool(
        (count * s.pages - 1) * s.page, s.page, jnp.dtype(s.dtype), s.kv_heads, s.head_dim, s.layers, mesh
    )
    both = jnp.stack(caches(s), 3).reshape(s.layers, -1, 2 * s.kv_heads, s.head_dim)
    pool.kv_buffer = [jnp.copy(x) for x in both]
    number, lengths = jnp.arange(count + 1, dtype=jnp.int32), jnp.full(count, s.keys, jnp.int32)
    metadata = attention.FlashAttentionMetadata(
        number[-1:], number, number * s.pages * s.page, step_serving.tables_of(s).ravel(), lengths,
        jnp.array([0, 0, count], jnp.int32),
    )  # fmt: skip

    def step(state: Any, weights: Any, metadata: Any) -> Any:
        pool, tokens = state
        backend = attention.FlashAttention(s.heads, s.kv_heads, s.head_dim, page_size=s.page, mesh=mesh)
        backend.forward_metadata = metadata
        places = lengths - 1
        batch = ForwardBatch(
            0, ForwardMode.DECODE, count, tokens, number[:-1], lengths, None, places, attn_backend=backend
        )
        model = nnx.merge(graph, weights)
        output, pool.kv_buffer, _ = model(batch, pool, LogitsMetadata(ForwardMode.DECODE))
        return (pool, tokens), output.next_token_logits

    return step, ((pool, number[:-1]), nnx.from_flat_state(flat), metadata)


# -- MaxText ---------------------------------------------------------------------------------------------------------


def maxtext(**changes: Any) -> None:
    """MaxText's own train_step in its default configuration, compiled with each attention side by side."""
    from maxtext.layers.attention_op import AttentionOp

    from jax_flash.compat import maxtext as compat

    on_cpu = jax.default_backend() == "cpu"
    own, other = AttentionOp.apply_attention, "plain JAX" if on_cpu else "cuDNN"
    products = None if on_cpu else measure.PRODUCTS
    with ThreadPoolExecutor() as pool:
        made = {}
        for name, attend in (("jax_flash", compat.apply_attention), (other, own)):
            AttentionOp.apply_attention = attend
            kernel = "cudnn_flash_jax" if name == "cuDNN" else "dot_product"
            lowered, *given = train_step(attention=kernel, **changes)
            made[name] = pool.submit(lowered.compile, compiler_options=products), given
        AttentionOp.apply_attention = own
        steps = {name: stepping(program.result(), *given) for name, (program, given) in made.items()}
    found = {name: [float(x) for x in step()] for name, step in steps.items()}
    assert off(*found.values()) < 2e-2, f"losses and norms of gradients are {found}"
    times = measure.in_turns({name: (step, [()]) for name, step in steps.items()}, 6, 0.5, settle=0.3)
    here, there = (times[name]["median"] for name in steps)
    print(
        f"maxtext {changes or 'default'}: a training step takes {1e3 * here:.1f} ms with jax_flash, {1e3 * there:.1f} "
        f"with {other}: {there / here:.3f} × its speed {measure.plus_minus(times)}; losses and norms {found}",
        flush=True,
    )


def train_step(**changes: Any) -> tuple[jax.stages.Lowered, Any, Any]:
    """train_step of a configuration, lowered, with its first state and a batch."""
    import maxtext
    from maxtext.common.train_state_nnx import TrainStateNNX
    from maxtext.configs import pyconfig
    from maxtext.trainers.pre_train import train
    from maxtext.utils import maxtext_utils, model_creation_utils, train_utils

    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    settings = dict(
        run_name="step", hardware="cpu" if jax.default_backend() == "cpu" else "gpu", enable_checkpointing=False,
        skip_jax_distributed_system=True, log_config=False, enable_dropout=False,
    )  # fmt: skip
    config = pyconfig.initialize(["", str(base)], **(settings | changes))
    mesh = maxtext_utils.get_mesh_from_config(config)
    make_model, abstract = model_creation_utils.create_nnx_abstract_model(config, mesh)
    _, optimizer = train_utils.create_training_optimizer(config, abstract, mesh=mesh)

    def make_state() -> TrainStateNNX:
        model = make_model()
        return TrainStateNNX(model, nnx.Optimizer(model, optimizer, wrt=nnx.Param))

    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        graph = nnx.split(nnx.eval_shape(make_state))[0]
        state = jax.jit(lambda: nnx.split(make_state())[1])()
        batch = train.make_synthetic_batch(config, maxtext_utils.get_shaped_batch(config))
        call = jax.jit(partial(train.train_step, graph, config, None, None), donate_argnums=0)
        return call.lower(state, batch), state, batch


def stepping(program: Any, state: Any, batch: Any) -> Callable[[], Any]:
    """A call that makes a step from the state of the step before: the loss, and the norm of the gradient."""

    def step() -> Any:
        nonlocal state
        state, metrics = program(state, batch)
        return [metrics["scalar"][f"learning/{x}"] for x in ("loss", "raw_grad_norm")]

    return step


SECTIONS: dict[str, Callable[[], None]] = {"pool": pool, "sglang": sglang, "maxtext": maxtext}

if __name__ == "__main__":
    for section in sys.argv[1:] or SECTIONS:
        SECTIONS[section]()
