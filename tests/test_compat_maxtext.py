"""compat.maxtext.apply_attention gives what MaxText's equations give, for every attention type and model mode."""

import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import IMPLEMENTATION
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from programs import require_devices

import jax_flash
from jax_flash.compat.maxtext import apply_attention, cudnn_flash_attention

pytestmark = pytest.mark.usefixtures("exact_products")

B, S, HQ, HK, D, DV = 2, 24, 4, 2, 16, 8
RANDOM = np.random.default_rng(4)
HIDDEN = -0.7 * np.finfo(np.float32).max
attend = partial(apply_attention, implementation=IMPLEMENTATION)


def normal(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


def op(kind="global", **changes):
    """The fields of an AttentionOp that the adapter reads."""
    base = dict(config=types.SimpleNamespace(moba=False), mesh=None)
    sizes = dict(sliding_window_size=5, chunk_attn_window_size=7, causal_block_size=4)
    own = dict(attention_type=types.SimpleNamespace(value=kind), attn_logits_soft_cap=None, dropout_rate=0.0)
    return types.SimpleNamespace(**(base | sizes | own | changes))


def seen(kind, sq=S, sk=S, first=0, q_ids=None, kv_ids=None, images=None):
    """MaxText's documented mask, [b, 1, sq, sk], with a window of 5, chunks of 7 and blocks of 4."""
    i, j = first + np.arange(sq)[:, None], np.arange(sk)
    visible = {
        "global": j <= i,
        "mla": j <= i,
        "full": j >= 0 * i,
        "local_sliding": (j > i - 5) & (j <= i),
        "chunk": (i // 7 == j // 7) & (j <= i),
        "block_diffusion": j // 4 <= i // 4,
    }[kind][None]
    if images is not None:
        starts = np.cumsum(np.diff(images.astype(int), prepend=0, axis=1) > 0, 1) * images
        rows = starts[:, first : first + sq, None]
        visible = visible | ((rows == starts[:, None]) & (rows > 0))
    if q_ids is not None:
        visible = visible & (q_ids[:, :, None] == kv_ids[:, None]) & (kv_ids >= 0)[:, None]
    return visible[:, None]


def equations(q, k, v, visible, softcap=None, sinks=None):
    """out and the capped, masked scores, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
    s = np.einsum("bqhd,bkhd->bhqk", q, k)
    s = s if softcap is None else softcap * np.tanh(s / softcap)
    s = np.where(visible, s, -np.inf)
    sink = np.full((1, q.shape[2], 1, 1), -np.inf) if sinks is None else np.reshape(sinks, (1, -1, 1, 1))
    top = np.maximum(np.maximum(s.max(-1, keepdims=True), sink), -1e9)
    p = np.exp(s - top)
    total = p.sum(-1, keepdims=True) + np.exp(sink - top)
    p = p / np.where(total == 0, 1, total)
    return np.einsum("bhqk,bkhd->bqhd", p, v), s


def close(got, want, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=tolerance, rtol=tolerance)


def qkv(sq=S, sk=S):
    return normal(B, sq, HQ, D) / 4, normal(B, sk, HK, D), normal(B, sk, HK, DV)


DOCUMENTS = np.repeat([[1, 2, 3, -1], [1, 1, 2, 2]], [9, 8, 4, 3], axis=1).astype(np.float32)
KINDS = ["global", "local_sliding", "chunk", "mla", "full", "block_diffusion"]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_training(kind, documents):
    q, k, v = qkv()
    ids = DOCUMENTS if documents else None
    out, largest, total = attend(op(kind), q, k, v, ids)
    assert (largest, total) == (None, None)
    close(out, equations(q, k, v, seen(kind, q_ids=ids, kv_ids=ids))[0])


def test_softcap_and_sinks_and_16_bit():
    q, k, v = qkv()
    sinks = normal(HQ)
    capped = op("local_sliding", attn_logits_soft_cap=2.0)
    want, _ = equations(8 * q, k, v, seen("local_sliding"), 2.0, sinks)
    close(attend(capped, 8 * q, k, v, None, sinks=sinks)[0], want)
    low = attend(capped, *(x.astype(jnp.bfloat16) for x in (8 * q, k, v)), None, sinks=sinks)[0]
    assert low.dtype == jnp.bfloat16
    close(low, want, 0.05)


def test_gradients_are_those_of_the_equations_in_plain_jax():
    q, k, v = qkv()
    sinks, dout = normal(HQ), normal(B, S, HQ, DV)
    visible = seen("chunk", q_ids=DOCUMENTS, kv_ids=DOCUMENTS)

    def plain(q, k, v, sinks):
        k, v = (jnp.repeat(x, HQ // HK, 2) for x in (k, v))
        s = jnp.where(visible, jnp.einsum("bqhd,bkhd->bhqk", q, k), HIDDEN)
        s = jnp.concatenate([s, jnp.broadcast_to(sinks[:, None, None], (B, HQ, S, 1))], -1)
        p = jax.nn.softmax(s)[..., :-1] * visible
        return jnp.einsum("bhqk,bkhd->bqhd", p, v)

    ours = lambda q, k, v, sinks: attend(op("chunk"), q, k, v, DOCUMENTS, sinks=sinks)[0]  # noqa: E731
    # Rows of padding see nothing: here they give 0, and with sinks in the equations too.
    for got, want in zip(jax.vjp(ours, q, k, v, sinks)[1](dout), jax.vjp(plain, q, k, v, sinks)[1](dout)):
        close(got, want, 1e-4)


@pytest.mark.parametrize("kind", ["global", "local_sliding"])
def test_images_see_themselves_both_ways(kind):
    q, k, v = qkv()
    images = np.zeros((B, S), bool)
    images[0, 3:7] = images[0, 8:9] = images[0, 20:] = images[1, :10] = True
    out = attend(op(kind), q, k, v, None, bidirectional_mask=images)[0]
    close(out, equations(q, k, v, seen(kind, images=images))[0])


@pytest.mark.parametrize("kind", ["global", "local_sliding", "chunk", "block_diffusion"])
def test_chunks_of_a_prompt(kind):
    """With `previous_chunk` the queries have later positions; the segment ids cover all keys."""
    q, k, v = qkv(sq=8)
    first, sq = 10, 8
    ids = DOCUMENTS[:, : first + sq]
    k, v = k[:, : first + sq], v[:, : first + sq]
    out, largest, total = attend(
        op(kind), q, k, v, ids, model_mode="prefill", previous_chunk=np.zeros((1, first))
    )
    rows = ids[:, first:]
    close(out, equations(q, k, v, seen(kind, sq, first + sq, first, rows, ids))[0])
    assert largest.shape == total.shape == (B, sq, HQ, 1)


def merged(parts):
    """MaxText's normalize_attention, which merges the results of several caches."""
    top = np.maximum(*(np.asarray(m, np.float64) for _, m, _ in parts))
    total = sum(np.exp(m - top) * s for _, m, s in parts)
    return sum(np.exp(m - top) / total * np.asarray(o) for o, m, _ in parts)


@pytest.mark.parametrize("kind", ["global", "local_sliding", "chunk", "mla"])
def test_a_decoding_step_merges_both_caches(kind):
    q, k, v = qkv(sq=1)
    sinks = normal(HQ)
    active = np.array([[1] * 9 + [0] * 7 + [1] * 4 + [0] * 4, [1] * 16 + [0] * 8])
    caches = [
        attend(op(kind), q, k[:, part], v[:, part], active[:, part], model_mode="autoregressive", **sink)
        for part, sink in ((slice(0, 16), {"sinks": sinks}), (slice(16, None), {}))
    ]
    # In each cache the query is at the last slot, and only active keys are visible.
    hides = kind if kind in ("local_sliding", "chunk") else "full"
    parts = [seen(hides, 1, 16, 15), seen(hides, 1, 8, 7)]
    visible = np.concatenate([np.broadcast_to(x, (B, *x.shape[1:])) for x in parts], -1)
    close(merged(caches), equations(q, k, v, visible & (active == 1)[:, None, None], sinks=sinks)[0])


def test_both_caches_without_a_key_give_zero_and_no_nan():
    q, k, v = qkv(sq=1)
    none = np.zeros((B, S), np.int32)
    part = attend(op(), q, k, v, none, model_mode="autoregressive")
    np.testing.assert_array_equal(merged([part, part]), 0)


def test_a_decoding_step_of_ragged_lengths():
    q, k, v = qkv(sq=1)
    lengths = np.array([5, 24], np.int32)
    call = dict(model_mode="autoregressive", use_ragged_attention=True)
    out, _, _ = attend(op(), q, k, v, None, lengths=lengths, **call)
    visible = np.arange(S) < lengths[:, None]
    close(out, equations(q, k, v, visible[:, None, None])[0])


class Quantised:
    def __init__(self, x):
        self.x = x

    def dequant(self):
        return self.x


def test_quantised_keys_of_one_prompt_serve_the_batch():
    q, k, v = qkv()
    out, _, _ = attend(op(), q, Quantised(k[:1]), Quantised(v[:1]), None, model_mode="prefill")
    close(out, equations(q, np.repeat(k[:1], B, 0), np.repeat(v[:1], B, 0), seen("global"))[0])


def test_an_indexer_and_moba_stay_dense_with_a_warning():
    q, k, v = qkv()
    kept, blocks = (RANDOM.random((B, n, S, S)) < 0.6 for n in (1, HQ))
    both = seen("global") & kept & blocks
    moba = np.where(blocks.reshape(B, HK, HQ // HK, S, S), 0, -np.inf)
    sparse = op(
        generate_attention_mask=lambda *_, **__: np.where(seen("global")[:, None], 0, HIDDEN),
        _generate_moba_mask=lambda *_: moba,
        config=types.SimpleNamespace(moba=True),
    )
    with pytest.warns(UserWarning, match="dense"):
        out = attend(sparse, q, k, v, None, indexer_mask=np.where(kept[:, 0], 0, HIDDEN))[0]
    close(out, equations(q, k, v, both)[0])


def test_the_largest_logits_are_recorded():
    pytest.importorskip("flax")
    q, k, v = qkv()
    own = op("local_sliding", attn_logits_soft_cap=3.0)
    attend(own, 8 * q, k, v, None, record_max_logits=True)
    _, s = equations(8 * q, k, v, seen("local_sliding"), 3.0)
    close(own.max_logits[...], s.max((-1, -2)))


def test_transformer_engines_call_has_its_result():
    q, k, v = qkv()
    out = cudnn_flash_attention(op("local_sliding"), q, k, v, DOCUMENTS, None, sinks=normal(HQ) - 50)
    close(out, equations(q, k, v, seen("local_sliding", q_ids=DOCUMENTS, kv_ids=DOCUMENTS))[0])


def balanced(kind, devices=4, **changes):
    config = types.SimpleNamespace(
        moba=False, context_parallel_reorder_strategy=None, packing=True, hardware="gpu",
        context_parallel_strategy="all_gather",
    )  # fmt: skip
    require_devices(2 * devices)
    mesh = Mesh(np.array(jax.devices()[: 2 * devices]).reshape(2, devices), ("data", "context"))
    axes = {"batch": "data", "length": "context"}
    return op(
        kind,
        **dict(
            config=config,
            mesh=mesh,
            flash_axis_names_q=("batch", "heads", "length", "d"),
            flash_axis_names_kv=("batch", "heads", "kv_length", "d"),
            _load_balanced_context_parallel=lambda: True,
            _logical_to_mesh_axes=lambda names: PartitionSpec(*(axes.get(x) for x in names)),
        )
        | changes,
    )


@pytest.mark.parametrize("kind", ["global", "local_sliding", "chunk", "full"])
def test_load_balanced_context_parallelism_is_a_ring(kind):
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    q, k, v = qkv()
    ids = np.repeat([[1, 2, 3], [4, 5, 5]], [9, 9, 6], axis=1).astype(np.int32)
    positions = np.concatenate([np.arange(9), np.arange(9), np.arange(6)])[None].repeat(B, 0)
    positions[1, 18:] += 9
    put = partial(jax_flash.zigzag_permute, devices=4)
    sinks = normal(HQ)
    run = jax.jit(lambda *x: attend(balanced(kind), *x[:4], x[4], sinks=sinks)[0])
    out = run(*map(put, (q, k, v, ids, positions)))
    visible = seen(kind, q_ids=ids, kv_ids=ids)
    if kind == "chunk":  # chunks begin at the first token of each document
        at = positions // 7
        visible = seen("global", q_ids=ids, kv_ids=ids) & (at[:, None, :, None] == at[:, None, None])
    close(jax_flash.zigzag_unpermute(out, 4), equations(q, k, v, visible, sinks=sinks)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_context_parallelism_in_order_of_the_sequence(kind):
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    own = balanced(kind, _load_balanced_context_parallel=lambda: False)
    rows = NamedSharding(own.mesh, PartitionSpec("data", "context"))
    q, k, v, ids = (jax.device_put(x, rows) for x in (*qkv(), DOCUMENTS))
    sinks = normal(HQ)
    run = jax.jit(lambda *x: cudnn_flash_attention(own, *x, None, sinks=sinks))
    out = run(q, k, v, ids)
    assert out.sharding.is_equivalent_to(rows, out.ndim)
    close(out, equations(q, k, v, seen(kind, q_ids=DOCUMENTS, kv_ids=DOCUMENTS), sinks=sinks)[0])


def test_a_ring_records_the_largest_logits_of_all_devices():
    pytest.importorskip("flax")
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    q, k, v = qkv()
    own = balanced("local_sliding")
    put = partial(jax_flash.zigzag_permute, devices=4)
    attend(own, *map(put, (8 * q, k, v)), None, record_max_logits=True)
    _, s = equations(8 * q, k, v, seen("local_sliding"))
    close(own.max_logits[...], s.max((-1, -2)))


REFUSED = {
    "dropout": (lambda: attend(op(dropout_rate=0.1), *qkv(), None), "dropout_rate is 0.1"),
    "type": (lambda: attend(op("vision"), *qkv(), None), "attention_type is 'vision', allowed are global, "),
    "window": (lambda: attend(op("chunk", chunk_attn_window_size=None), *qkv(), None), "chunk_attn_window_size must"),
    "striped": (
        lambda: attend(balanced("global", config=types.SimpleNamespace(
            moba=False, context_parallel_reorder_strategy=types.SimpleNamespace(value="striped"), packing=False,
            context_parallel_strategy="ring", hardware="gpu")), *qkv(), None),
        "context_parallel_reorder_strategy is striped",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_lacks_it_says(name):
    if name == "striped" and len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    run, message = REFUSED[name]
    with pytest.raises((ValueError, NotImplementedError), match=f"^maxtext.apply_attention: {message}"):
        run()
