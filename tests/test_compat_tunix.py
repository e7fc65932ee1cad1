"""compat.tunix replaces Splash attention: in the calls that tunix's blocks make, and in tunix if it is installed."""

import sys
from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
import masked_reference
import numpy as np
import pytest
from flash_attn_reference import assert_close, normal
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from programs import require_devices

from jax_flash.compat import tunix
from jax_flash.compat.splash import CausalMask, LocalMask, MultiHeadMask

B, T, CACHE, HQ, HK, D = 2, 24, 32, 4, 2, 16
Q, K, V = normal(0, B, T, HQ, D), normal(1, B, CACHE, HK, D), normal(2, B, CACHE, HK, D)
IDS = np.repeat([[1, 2, 0], [1, 1, 2]], [9, 11, 4], axis=1).astype(np.int32)
ROW, KEY = np.arange(T)[:, None], np.arange(T)


def block(q, k, v, mask=None, segment_ids=None, devices=1):
    """Calls compat.tunix as a block of tunix with `use_flash_attention` does. It scales q, as the kernel does not."""
    mesh = Mesh(np.array(jax.devices()[:devices]).reshape(1, devices), ("fsdp", "tp"))
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    mask = CausalMask((T, T)) if mask is None else mask
    kernel = tunix.make_splash_mha(
        MultiHeadMask([mask] * HQ),
        block_sizes=tunix.BlockSizes(block_q=128, block_kv=128),
        head_shards=devices,
        q_seq_shards=1,
    )
    rows = keys = PartitionSpec("fsdp", "tp", None, None)
    spec = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec("tp", None)))
    ids = PartitionSpec("fsdp", None)
    split = partial(jax.shard_map, mesh=mesh, out_specs=rows)
    if segment_ids is None:
        run = split(lambda kernel, *x: jax.vmap(kernel)(*x), in_specs=(spec, rows, keys, keys))
        out = run(kernel, q * D**-0.5, k, v)
    else:

        def attend(kernel, q, k, v, *ids):
            return jax.vmap(kernel)(q, k, v, segment_ids=tunix.SegmentIds(*ids))

        run = split(attend, in_specs=(spec, rows, keys, keys, ids, ids))
        out = run(kernel, q * D**-0.5, k, v, segment_ids, segment_ids)
    return jnp.swapaxes(out, 1, 2)


def right(seen):
    """The output that float64 numpy gives; row i sees key j where `seen` is true."""
    return masked_reference.attend(Q, K[:, :T], V[:, :T], seen)[0]


@pytest.mark.parametrize("keys", [T, CACHE], ids=["training", "a prompt with its cache"])
def test_causal(keys):
    assert_close(block(Q, K[:, :keys], V[:, :keys]), right(ROW >= KEY))


def test_a_sliding_window():
    out = block(Q, K, V, LocalMask((T, T), (4, 0), 0))
    assert_close(out, right((ROW >= KEY) & (ROW - KEY <= 4)))


def test_packed_documents():
    same = IDS[:, None, :, None] == IDS[:, None, None]
    assert_close(block(Q, K, V, segment_ids=IDS), right(same & (ROW >= KEY)))


def test_heads_on_two_devices():
    require_devices(2)
    assert_close(block(Q, K, V, devices=2), right(ROW >= KEY))


def test_keys_past_the_mask_are_not_read_and_get_no_gradient():
    k, v = (np.where(np.arange(CACHE)[:, None, None] < T, x, np.nan) for x in (K, V))
    out, pull = jax.vjp(lambda k, v: block(Q, k, v), k, v)
    assert_close(out, right(ROW >= KEY))
    for gradient in pull(jnp.ones_like(out)):
        assert np.isfinite(gradient).all()
        assert not np.any(gradient[:, T:])


@pytest.mark.parametrize("holder", ["model", "attention"])  # until 0.1.7, and Gemma 4 after it
def test_patch_finds_where_a_model_calls_splash(holder, monkeypatch):
    names = ("models.gemma4.model", "models.gemma4.attention", "models.gemma40.model")
    modules = {name: ModuleType(name) for name in names}
    for name, x in modules.items():
        x.__package__ = name.rpartition(".")[0]
        monkeypatch.setitem(sys.modules, name, x)
    model, other = modules["models.gemma4.model"], modules["models.gemma40.model"]
    other.splash = None
    with pytest.raises(NotImplementedError, match=r"^tunix.patch: no module of models\.gemma4 has splash"):
        tunix.patch(model)
    modules[f"models.gemma4.{holder}"].splash = None
    tunix.patch(model)
    assert [name for name, x in modules.items() if getattr(x, "splash", None) is tunix] == [
        f"models.gemma4.{holder}"
    ]
    assert sum(hasattr(x, "splash") for x in modules.values()) == 2


TINY = dict(num_layers=2, embed_dim=64, hidden_dim=128, num_heads=HQ, head_dim=D, num_kv_heads=HK)
MODELS = {
    "qwen2": ("Qwen2", "qwen2p5_0p5b", dict(vocab_size=64)),
    "qwen3": ("Qwen3", "qwen3_0p6b", dict(vocab_size=64)),
    "gemma4": (
        "Gemma4",
        "gemma4_e2b",
        dict(num_embed=64, per_layer_input_dim=0, frac_shared_layers=0.0, sliding_window_size=5),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_is_tunix_s_own(name):
    """A model of tunix has the same loss and gradients with compat.tunix as with tunix's plain attention."""
    model = pytest.importorskip(f"tunix.models.{name}.model")
    nnx = pytest.importorskip("flax.nnx")
    cls, constructor, options = MODELS[name]
    config = getattr(model.ModelConfig, constructor)()
    for field, x in (TINY | options | dict(dtype=jnp.float32, param_dtype=jnp.float32)).items():
        setattr(config, field, x)
    if name == "gemma4":
        config.global_key_size = D
        config.attention_pattern = (model.AttentionType.LOCAL_SLIDING, model.AttentionType.GLOBAL)
    tunix.patch(model)
    tokens = np.random.default_rng(0).integers(1, 64, (B, T))
    given = (tokens, np.tile(np.arange(T), (B, 1)), None, np.tile(ROW >= KEY, (B, 1, 1)))
    found = []
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    with mesh, jax.default_matmul_precision("highest"):
        for config.use_flash_attention in (False, True):
            one = getattr(model, cls)(config, rngs=nnx.Rngs(0))
            found.append(nnx.value_and_grad(lambda one: jnp.sin(one(*given)[0]).sum())(one))
    for got, wanted in zip(jax.tree.leaves(found[1]), jax.tree.leaves(found[0])):
        assert_close(got, wanted, 1e-4 * max(1, float(np.abs(wanted).max())))
