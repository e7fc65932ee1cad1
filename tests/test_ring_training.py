"""A training step in Flax with a split sequence: scan over layers with remat, on meshes of one to three axes."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import assert_same, collectives, custom_calls, require_devices, shard_shapes

from jax_flash import ring_attention
from jax_flash.flax import attention_fn

nnx = pytest.importorskip("flax.nnx")

LAYERS, BATCH, LENGTH, HEADS, HEAD_DIM = 3, 2, 16, 4, 8
WIDTH = HEADS * HEAD_DIM
MESHES = [
    {"sequence": 2},
    {"sequence": 8},
    {"data": 2, "sequence": 4},
    {"data": 2, "sequence": 2, "heads": 2},
]
KEEP_ATTENTION = jax.checkpoint_policies.save_only_these_names("flash_out", "flash_lse")


class Block(nnx.Module):
    def __init__(self, attend, rngs):
        self.attention = nnx.MultiHeadAttention(
            HEADS, WIDTH, attention_fn=attend, decode=False, deterministic=True, rngs=rngs
        )
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.attention(self.norm(x), is_causal=True)


class Layers(nnx.Module):
    """Blocks with stacked weights, run by scan. The backward computes each block again, except for its attention."""

    def __init__(self, attend, policy, rngs):
        make = nnx.vmap(lambda rngs: Block(attend, rngs), in_axes=0, out_axes=0)
        self.blocks = make(rngs.split(LAYERS))
        self.policy = policy

    def __call__(self, x):
        run = nnx.remat(Block.__call__, policy=self.policy)
        return nnx.scan(lambda x, block: run(block, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
            x, self.blocks
        )


def ring_fn(query, key, value, *, implementation, is_causal=False, **_):
    """An attention_fn that is manual over the sequence axis only, so that XLA splits batch and heads."""
    attend = partial(ring_attention, axis_name="sequence", causal=is_causal, implementation=implementation)
    shard = P(None, "sequence")
    mapped = jax.shard_map(attend, in_specs=(shard,) * 3, out_specs=shard, axis_names={"sequence"})
    return mapped(query, key, value)


def trained(attend, policy=KEEP_ATTENTION):
    """(weights, step). The step maps (weights, x) to (weights, loss), with one gradient step on the weights."""
    graph, weights, others = nnx.split(Layers(attend, policy, nnx.Rngs(0)), nnx.Param, ...)

    def step(weights, x):
        def loss(weights):
            return jnp.mean((nnx.merge(graph, weights, others)(x) - jnp.roll(x, 1, 1)) ** 2)

        value, gradient = jax.value_and_grad(loss)(weights)
        return jax.tree.map(lambda w, g: w - 0.1 * g, weights, gradient), value

    return weights, step


def run_on(axes, attend):
    """The step's results on a mesh, and its compiled program's text."""
    count = 1
    for size in axes.values():
        count *= size
    require_devices(count)
    types = (AxisType.Auto,) * len(axes)
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), types, devices=jax.devices()[:count])
    weights, step = trained(attend)
    x = jax.random.normal(jax.random.key(1), (BATCH, LENGTH, WIDTH), jnp.float32)
    rows = P("data" if "data" in axes else None, "sequence")
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, rows))
        weights = jax.device_put(weights, by_heads(mesh, weights))
        compiled = jax.jit(step).lower(weights, placed).compile()
        return compiled(weights, placed), compiled.as_text()


def by_heads(mesh, weights):
    """Query, key and value weights split over heads [layers, width, heads, head dim], all else replicated."""

    def spec(path, x):
        split = "heads" in mesh.shape and x.ndim == 4 and x.shape[2] == HEADS and "out" not in str(path)
        return NamedSharding(mesh, P(None, None, "heads") if split else P())

    return jax.tree.map_with_path(spec, weights)


@pytest.fixture(scope="module")
def alone():
    """The training step on one device, in plain JAX."""
    weights, step = trained(partial(attention_fn, implementation="xla"), policy=None)
    x = jax.random.normal(jax.random.key(1), (BATCH, LENGTH, WIDTH), jnp.float32)
    return jax.jit(step)(weights, x)


@pytest.mark.parametrize(
    "axes", MESHES, ids=lambda axes: " × ".join(f"{n} {size}" for n, size in axes.items())
)
@pytest.mark.parametrize("form", ["jit", "shard_map"])
def test_a_training_step_with_a_split_sequence_is_that_of_one_device(kernel, alone, axes, form):
    attend = attention_fn if form == "jit" else ring_fn
    got, text = run_on(axes, partial(attend, implementation=kernel))
    assert_same(jax.device_get(got), jax.device_get(alone), tolerance=1e-4)
    assert set(collectives(text)) == {"collective-permute", "all-reduce"}
    rows = BATCH // axes.get("data", 1)
    shard = (rows, LENGTH // axes["sequence"], HEADS // axes.get("heads", 1), HEAD_DIM)
    assert shard_shapes(text, "forward") == shard_shapes(text, "backward") == {shard}


def test_remat_keeps_what_the_ring_computed(kernel):
    """There are as many forwards as backwards; without the policy each ring would run its forward twice."""
    _, text = run_on({"sequence": 4}, partial(ring_fn, implementation=kernel))
    calls = custom_calls(text)
    assert calls["forward"] == calls["backward"] == 4
