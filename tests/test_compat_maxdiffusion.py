"""compat.maxdiffusion against numpy, and against MaxDiffusion's own where it is installed."""

import re

import jax
import jax.numpy as jnp
import masked_reference
import numpy as np
import pytest
from flash_attn_reference import assert_close, normal, slope

from jax_flash.compat.maxdiffusion import apply_attention

B, SQ, SK, H, D = 2, 7, 9, 4, 16
Q, K, V = normal(0, B, SQ, H * D), normal(1, B, SK, H * D), normal(2, B, SK, H * D)
EXISTS = np.array([[True] * 5 + [False] * 4, [False] * 9])
SEEN, CAUSAL = EXISTS[:, None, None], np.arange(SQ)[:, None] >= np.arange(SK)
STEERING = dict(  # what AttentionOp passes besides
    dim_head=D,
    split_head_dim=True,
    float32_qk_product=True,
    attention_kernel="dot_product",
    flash_min_seq_length=4096,
    use_memory_efficient_attention=False,
    mesh=None,
    axis_names_q=(),
    axis_names_kv=(),
    flash_block_sizes=None,
    dpa_layer=None,
)
CALLS = {  # the arguments of MaxDiffusion, and of the reference
    "plain": ({}, {}),
    "scale": (dict(scale=0.5), dict(scale=0.5)),
    "a mask": (dict(attention_mask=EXISTS.astype(np.int32)), dict(seen=SEEN)),
    "causal": (dict(attention_mask=EXISTS, is_causal=True), dict(seen=SEEN & CAUSAL)),
}


def by_head(x):
    return x.reshape(*x.shape[:2], H, D)


@pytest.mark.parametrize("name", CALLS)
def test_it_is_the_equations(name, implementation):
    given, wanted = CALLS[name]
    out = apply_attention(Q, K, V, H, **STEERING, **given, implementation=implementation)
    assert_close(out, masked_reference.attend(*map(by_head, (Q, K, V)), **wanted)[0].reshape(Q.shape))


def test_heads_may_have_a_dimension_of_their_own():
    arrays = [by_head(x).swapaxes(1, 2) for x in (Q, K, V)]
    assert_close(apply_attention(*arrays, H), apply_attention(Q, K, V, H))


def test_it_differentiates():
    def loss(q, k, v):
        return jnp.sin(apply_attention(q, k, v, H, attention_mask=EXISTS)).sum()

    def equations(*x):
        return np.sin(masked_reference.attend(*map(by_head, x), SEEN)[0]).sum()

    wanted, along = slope(equations, (Q, K, V))
    got = sum((g * u).sum() for g, u in zip(jax.grad(loss, range(3))(Q, K, V), along))
    assert_close(got, wanted, 1e-4)


@pytest.mark.parametrize(
    ("dtype", "of_values", "wanted"),
    [
        (None, "bfloat16", "bfloat16"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float32", "bfloat16", "float32"),
        ("bfloat16", "float32", "float32"),
    ],
)
def test_the_result_has_the_dtype_of_weights_and_values(dtype, of_values, wanted):
    assert apply_attention(Q, K, jnp.asarray(V, of_values), H, dtype=dtype).dtype == wanted


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ((Q[..., :-1], K, V), {}, "query must be [b, s, heads·d] with 4 heads, or [b, heads, s, d], got"),
        ((Q, K, V), dict(attention_mask=EXISTS[:1]), "attention_mask"),
        ((Q, K, V), dict(heads=0), "heads must be at least 1, got 0"),
    ],
)
def test_errors(arrays, options, message):
    with pytest.raises(ValueError, match=f"^maxdiffusion.apply_attention: {re.escape(message)}"):
        apply_attention(*arrays, **{"heads": H, **options})


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("split_head_dim", [False, True])
def test_it_is_maxdiffusion_s_own(masked, split_head_dim):
    own = pytest.importorskip("maxdiffusion.models.attention_flax")
    options = STEERING | dict(scale=0.3, dtype=jnp.float32, split_head_dim=split_head_dim)
    mask = EXISTS if masked else None
    wanted = own._apply_attention(*map(jnp.asarray, (Q, K, V)), H, **options, attention_mask=mask)
    assert_close(apply_attention(Q, K, V, H, **options, attention_mask=mask), wanted)


def test_a_layer_trains_as_with_maxdiffusion_s_own(monkeypatch):
    own = pytest.importorskip("maxdiffusion.models.attention_flax")
    layer = own.FlaxAttention(H * D, heads=H, dim_head=D)
    params = layer.init(jax.random.key(0), jnp.asarray(Q), jnp.asarray(K))
    calls = []

    def counted(*given, **options):
        calls.append(options)
        return apply_attention(*given, **options)

    def step():
        return jax.value_and_grad(lambda p: (layer.apply(p, jnp.asarray(Q), jnp.asarray(K)) ** 2).sum())(
            params
        )

    wanted = step()
    monkeypatch.setattr(own, "_apply_attention", counted)
    jax.tree.map(lambda got, want: assert_close(got, want, 1e-4), step(), wanted)
    assert len(calls) == 1
