"""Compares compat.gemma with gemma's equations on mock modules, and with gemma if it is installed."""

import enum
import sys
import types

import jax
import jax.numpy as jnp
import masked_reference
import numpy as np
import pytest
from flash_attn_reference import assert_close, normal

from jax_flash.compat import gemma

pytestmark = pytest.mark.usefixtures("exact_products")

B, T, KEYS, HEADS, KV, D, FEATURES = 2, 12, 16, 4, 2, 16, 8
POSITIONS = np.tile(np.arange(T, dtype=np.int32), (B, 1))
IMAGES = np.array([[0, 0, 1, 1, 1, 0, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0]])
USED = np.array([[1] * 12, [1] * 11 + [0]], bool)
X = normal(0, B, T, FEATURES)
Type = enum.Enum("AttentionType", ["GLOBAL", "LOCAL_SLIDING"])


@pytest.fixture(autouse=True)
def rotary(monkeypatch):
    """Replaces gemma's embedding, which is no part of the adapter, by one that adds the positions."""

    def apply_rope(x, positions, *, base_frequency, scale_factor, rope_proportion=0.0):
        turn = positions[..., None, None] * (base_frequency + rope_proportion) / scale_factor
        return x * (1 + 0.01 * turn).astype(x.dtype)

    embeddings = types.SimpleNamespace(apply_rope=apply_rope)
    for name in ("gemma", "gemma.gm"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(
        sys.modules, "gemma.gm.math", types.SimpleNamespace(_positional_embeddings=embeddings)
    )


class Gemma3:
    """The fields of an Attention module that the adapter reads."""

    attn_type, sliding_window_size, attn_logits_soft_cap = Type.GLOBAL, None, None
    rope_base_frequency, rope_scale_factor, query_pre_attn_scalar = 1.0, 2.0, 0.3
    use_qkv_einsum, use_gqa = False, True
    intermediates = False

    def __init__(self, **changes):
        self.__dict__ |= changes
        self.w = dict(zip("qkvo", (normal(1, HEADS, FEATURES, D), *normal(2, 2, KV, FEATURES, D))))
        self.w["o"] = normal(3, HEADS, D, FEATURES)
        self.captured = []

    @classmethod
    def init_cache(cls):
        pool = jnp.zeros((B, KEYS, KV, D))
        counts = dict(end_index=jnp.zeros(B, jnp.int32), positions=jnp.zeros((B, KEYS), jnp.int32))
        return dict(k=pool, v=pool) | counts

    def __call__(self, x, segment_pos, cache, attn_mask):
        raise AssertionError("gemma's own attention ran")

    def q_einsum(self, equation, x):
        return jnp.einsum(equation, x, self.w["q"])

    def kv_einsum(self, equation, x):
        return jnp.einsum(equation, x, np.stack([self.w["k"], self.w["v"]]))

    def attn_vec_einsum(self, equation, x):
        return jnp.einsum(equation, x, self.w["o"])

    def _query_norm(self, x):
        return 0.5 * x

    def _key_norm(self, x):
        return 0.25 * x

    def attention_weights(self, x):
        self.captured.append(x)
        return x

    def is_mutable_collection(self, name):
        return self.intermediates and name == "intermediates"


class Gemma4(Gemma3):
    qk_norm_with_scale, k_eq_v, rope_proportion = True, False, 0.5
    query_norm, key_norm = Gemma3._query_norm, Gemma3._key_norm

    def value_norm(self, x):
        return 2.0 * x

    def k_einsum(self, equation, x):
        return jnp.einsum(equation, x, self.w["k"])


def patched(cls, ranges=False, **changes):
    made = type(cls.__name__, (cls,), {})
    gemma.patch(made, ranges=ranges)
    return made(**changes)


def text(images=None):
    """gemma's mask: causal, bidirectional within an image, without padding."""
    seen = np.tril(np.ones((T, T), bool)) & USED[:, None]
    if images is not None:
        spans = np.cumsum(np.diff(images, prepend=0, axis=1) > 0, 1) * images
        seen = seen | ((spans[:, :, None] == spans[:, None]) & (spans > 0)[:, None])
    return seen


def padded(mask):
    return np.pad(mask, ((0, 0), (0, 0), (0, KEYS - mask.shape[-1])))


def projected(layer, x, positions):
    """Computes q, k and v by gemma's equations, in numpy."""
    new, w = isinstance(layer, Gemma4), layer.w
    turn = 1 + 0.01 * positions[..., None, None] * (1.5 if new else 1.0) / 2
    q, k, v = (np.einsum("btd,ndh->btnh", x, w[name]) for name in "qkv")
    v = k if getattr(layer, "k_eq_v", False) else v
    return 0.5 * q * turn, 0.25 * k * turn, 2.0 * v if new else v


def equations(layer, q, k, v, seen):
    scale = 1.0 if isinstance(layer, Gemma4) else 0.3
    out, _ = masked_reference.attend(q, k, v, seen[:, None], scale=scale, softcap=layer.attn_logits_soft_cap)
    return np.einsum("btnh,nhd->btd", out, layer.w["o"])


LAYERS = {
    "global": {},
    "sliding": dict(attn_type=Type.LOCAL_SLIDING, sliding_window_size=4),
    "capped": dict(attn_logits_soft_cap=1.5),
}


@pytest.mark.parametrize("ranges", [False, True])
@pytest.mark.parametrize("images", [None, IMAGES], ids=["text", "images"])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("cls", [Gemma3, Gemma4])
def test_a_layer_without_a_cache(cls, name, images, ranges):
    layer = patched(cls, ranges, **LAYERS[name])
    cache, out = layer(X, POSITIONS, None, text(images))
    seen = text(images)
    if name == "sliding":
        seen = seen & (np.abs(np.arange(T)[:, None] - np.arange(T)) < 4)
    q, k, v = projected(layer, X, POSITIONS)
    assert_close(out, equations(layer, q, k, v, seen), 2e-5)
    if cls is Gemma3:
        assert cache is None
    else:
        assert_close(cache["k"], k, 1e-5)


def test_a_sliding_mask_that_gemma_skips():
    layer = patched(Gemma4, **LAYERS["sliding"])
    whole = patched(Gemma4)
    got = layer(X, POSITIONS, None, text(), skip_sliding_mask=True)[1]
    assert_close(got, whole(X, POSITIONS, None, text())[1], 1e-6)


@pytest.mark.parametrize("ranges", [False, True])
@pytest.mark.parametrize("cls", [Gemma3, Gemma4])
def test_steps_after_a_padded_prompt(cls, ranges):
    """The padding of a prompt stays in the cache, so the window of the next token is two ranges of keys."""
    layer = patched(cls, ranges, attn_type=Type.LOCAL_SLIDING, sliding_window_size=6)
    positions = np.maximum(np.cumsum(USED, 1) - 1, 0).astype(np.int32)
    cache, out = layer(X, positions, layer.init_cache(), padded(text()))
    q, k, v = projected(layer, X, positions)
    near = np.abs(positions[:, :, None] - positions[:, None]) < 6
    wanted = equations(layer, q, k, v, text() & near)
    assert_close(out, wanted, 2e-5, np.abs(wanted).max())
    x, position = normal(7, B, 1, FEATURES), positions[:, -1:] + 1
    seen = np.concatenate([USED, np.ones((B, 1), bool)], 1)[:, None]
    cache, out = layer(x, position, cache, padded(seen))
    q, *new = projected(layer, x, position)
    k, v = (np.concatenate(pair, 1) for pair in zip((k, v), new))
    every = np.concatenate([positions, position], 1)
    wanted = equations(layer, q, k, v, seen & (np.abs(every - position) < 6)[:, None])
    assert_close(out, wanted, 2e-5, np.abs(wanted).max())
    np.testing.assert_array_equal(cache["end_index"], T + 1)
    np.testing.assert_array_equal(cache["positions"][:, : T + 1], every)


def test_the_cache_is_a_ring():
    layer = patched(Gemma4)
    full = layer.init_cache() | {"end_index": np.array([KEYS - 1, 3], np.int32)}
    cache, _ = layer(X[:, :2], POSITIONS[:, :2] + 40, full, np.ones((B, 2, KEYS), bool))
    assert [list(np.flatnonzero(row)) for row in cache["positions"]] == [[0, KEYS - 1], [3, 4]]


@pytest.mark.parametrize("k_eq_v", [False, True])
def test_keys_of_another_layer(k_eq_v):
    layer = patched(Gemma4, k_eq_v=k_eq_v)
    shared, _ = layer(X, POSITIONS, None, text())
    x = normal(8, B, T, FEATURES)
    _, out = layer(x, POSITIONS, None, text(), kv_shared_cache=shared)
    q = projected(layer, x, POSITIONS)[0]
    assert_close(out, equations(layer, q, *projected(layer, X, POSITIONS)[1:], text()), 2e-5)


def test_heads_that_are_projected_together():
    layer = patched(Gemma3, use_qkv_einsum=True)
    w = np.stack([layer.w["q"], *(np.repeat(layer.w[name], 2, 0) for name in "kv")])
    layer.qkv_einsum = lambda equation, x: jnp.einsum(equation, x, w)
    out = layer(X, POSITIONS, None, text())[1]
    assert_close(out, patched(Gemma3)(X, POSITIONS, None, text())[1], 1e-5)


def test_a_mask_of_more_than_two_ranges_is_nan_where_two_were_promised():
    mask = np.repeat(text(), 1, 0)
    mask[0, 9] = [1, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    mask[1, 9] = [1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    out = patched(Gemma3, True)(X, POSITIONS, None, mask)[1]
    nan = np.isnan(out).all(-1)
    assert np.argwhere(nan).tolist() == [[0, 9]]
    dense = patched(Gemma3)(X, POSITIONS, None, mask)[1]
    assert_close(np.where(nan[..., None], 0, out), np.where(nan[..., None], 0, dense), 1e-5)


def test_captured_weights_are_softmax_of_the_scores():
    layer = patched(Gemma3, intermediates=True, attn_logits_soft_cap=1.5)
    out = layer(X, POSITIONS, None, text(IMAGES))[1]
    (weights,) = layer.captured
    assert weights.shape == (B, T, HEADS, T)
    v = np.repeat(projected(layer, X, POSITIONS)[2], 2, 2)
    assert_close(np.einsum("btns,bsnh,nhd->btd", weights, v, layer.w["o"]), out, 2e-5)


def test_it_differentiates():
    def loss(x, ranges):
        return jnp.sin(patched(Gemma4, ranges)(x, POSITIONS, None, text(IMAGES))[1]).sum()

    layer = patched(Gemma4)
    x, along, step = X.astype(float), normal(9, *X.shape).astype(float), 1e-5
    ahead, behind = (
        np.sin(equations(layer, *projected(layer, x + e * along, POSITIONS), text(IMAGES))).sum()
        for e in (step, -step)
    )
    for ranges in (False, True):
        gradient = jax.grad(loss)(X, ranges)
        assert_close((gradient * along).sum(), (ahead - behind) / (2 * step), 1e-4)


def test_errors():
    with pytest.raises(TypeError, match=r"^gemma.patch: modules must be Attention classes of gemma, got 3"):
        gemma.patch(3)

    class OfTwoInputs(Gemma4):
        """As T5Gemma's, which attends from one sequence to another."""

        def __call__(self, x_q, x_kv, pos_q, pos_kv, cache, mask):
            raise NotImplementedError

    with pytest.raises(
        TypeError, match=r"^gemma.patch: modules must be Attention classes of gemma, got <class"
    ):
        gemma.patch(OfTwoInputs)
    layer = patched(Gemma3, attn_type=Type.LOCAL_SLIDING)
    with pytest.raises(ValueError, match=r"^gemma.patch: a LOCAL_SLIDING layer needs sliding_window_size"):
        layer(X, POSITIONS, None, text())


@pytest.mark.parametrize("package", ["", ".gemma3n", ".gemma4"])
def test_it_is_gemma_s_own(package, monkeypatch):
    monkeypatch.undo()
    modules = pytest.importorskip(f"gemma.gm.nn{package}._modules")
    new = {"head_dim": D, "query_pre_attn_scalar": D**-0.5}
    if package == ".gemma4":
        new = {"key_size": D, "rope_proportion": 0.5}
    local = dict(attn_type=modules.AttentionType.LOCAL_SLIDING, sliding_window_size=4)
    layer = modules.Attention(num_heads=HEADS, num_kv_heads=KV, features=FEATURES, **new, **local)
    given = (X, POSITIONS, None, text(IMAGES))
    used = USED[..., None]

    def loss(layer, parameters, x):
        return jnp.sin(jnp.where(used, layer.apply(parameters, x, *given[1:])[1], 0)).sum()

    with jax.default_matmul_precision("highest"):
        wanted, parameters = layer.init_with_output(jax.random.key(0), *given)
        # A subclass, so that gemma's own class is not patched.
        made = type("Attention", (modules.Attention,), {})
        gemma.patch(made)
        mine = made(num_heads=HEADS, num_kv_heads=KV, features=FEATURES, **new, **local)
        got, own = mine.init_with_output(jax.random.key(0), *given)
        gradients = [jax.grad(loss, (1, 2))(one, parameters, X) for one in (mine, layer)]
    jax.tree.map(np.testing.assert_array_equal, own, parameters)
    assert_close(np.where(used, got[1], 0), np.where(used, wanted[1], 0), 1e-5)
    jax.tree.map(lambda *pair: assert_close(*pair, 1e-4), *gradients)
