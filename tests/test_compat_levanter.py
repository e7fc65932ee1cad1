"""jax_flash.compat.levanter, over named axes, against numpy, and against Levanter itself where it is installed."""

import re
import sys
import types
from functools import partial

import jax
import jax.numpy as jnp
import masked_reference
import named_arrays
import numpy as np
import pytest
from flash_attn_reference import assert_close, i32, normal, slope
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from named_arrays import AttentionMask, Axis, NamedArray
from programs import require_devices

from jax_flash.compat.levanter import dot_product_attention, patch

B, H, G, P, D, DV = (
    Axis(name, size)
    for name, size in (
        ("batch", 2),
        ("kv_head", 2),
        ("group", 3),
        ("position", 12),
        ("head_size", 16),
        ("value", 8),
    )
)
KP = P.alias("key_position")
ROW, KEY = np.arange(12)[:, None], np.arange(12)
IDS = i32([0] * 5 + [1] * 7, [2] * 3 + [0] * 9)
SAME = (IDS[:, :, None] == IDS[:, None])[:, None]
OFFSETS = i32(2, 0)
EXPLICIT = np.random.default_rng(4).random((2, 12, 12)) < 0.6
BIAS, SINKS = normal(5, 3, 12, 12), normal(6, 2, 3)


def named(seed, *axes):
    return NamedArray(normal(seed, *(axis.size for axis in axes)), axes)


Q, K, V = named(0, B, H, G, P, D), named(1, B, H, KP, D), named(2, B, H, KP, DV)
MASKS = {
    "none": (None, True),
    "causal": (AttentionMask(True), ROW >= KEY),
    "window": (AttentionMask(True, sliding_window=4), (ROW >= KEY) & (ROW - KEY < 4)),
    "window alone": (AttentionMask(sliding_window=4), (ROW >= KEY) & (ROW - KEY < 4)),
    "window on both sides": (AttentionMask(bidirectional_window=2), abs(ROW - KEY) <= 2),
    "windows": (AttentionMask(sliding_window=4, bidirectional_window=2), (ROW >= KEY) & (ROW - KEY <= 2)),
    "offset": (AttentionMask(True, NamedArray(i32(3)[0], ())), ROW + 3 >= KEY),
    "offsets": (
        AttentionMask(True, NamedArray(OFFSETS, (B,)), sliding_window=5),
        (ROW + OFFSETS[:, None, None, None] >= KEY) & (ROW >= KEY) & (ROW - KEY < 5),
    ),
    "segments": (AttentionMask(True, segment_ids=(NamedArray(IDS, (B, P)),) * 2), SAME & (ROW >= KEY)),
    "segments of one entry": (
        AttentionMask(segment_ids=(NamedArray(IDS[0], (P,)), NamedArray(IDS[0], (KP,)))),
        SAME[:1],
    ),
    "explicit": (
        AttentionMask(True, NamedArray(i32(1)[0], ()), NamedArray(EXPLICIT, (B, P, KP))),
        EXPLICIT[:, None] & (ROW + 1 >= KEY),
    ),
    "an array": (NamedArray(EXPLICIT.transpose(1, 0, 2), (P, B, KP)), EXPLICIT[:, None]),
}


@pytest.fixture(autouse=True)
def haliax(monkeypatch):
    named_arrays.stand_in(monkeypatch)


def attend(q=Q, k=K, v=V, mask=None, **options):
    return dot_product_attention(P, KP, D, q, k, v, mask, **options)


def right(q=Q, k=K, v=V, seen=True, **options):
    """The output that float64 numpy gives, as [B, H, G, P, DV]; row i sees key j where `seen` is true."""
    q = q.rearrange((B, P, H, G, D)).array.reshape(2, 12, 6, 16)
    k, v = (x.rearrange((B, KP, H, x.axes[-1])).array for x in (k, v))
    out = masked_reference.attend(q, k, v, seen, **options)[0]
    return out.reshape(2, 12, 2, 3, 8).transpose(0, 2, 3, 1, 4)


@pytest.mark.parametrize("name", MASKS)
def test_masks(name, implementation):
    mask, seen = MASKS[name]
    out = attend(mask=mask, implementation=implementation)
    assert out.axes == (B, H, G, P, DV)
    assert_close(out.array, right(seen=seen))


def test_scores():
    bias = NamedArray(BIAS, (G, P, KP))
    of_heads = np.tile(BIAS, (2, 1, 1))
    assert_close(attend(bias=bias, scaling_factor=0.3).array, right(bias=of_heads, scale=0.3))
    assert_close(attend(attn_sink=NamedArray(SINKS, (H, G))).array, right(sinks=SINKS.reshape(-1)))
    one = NamedArray(SINKS[0], (G,))
    assert_close(attend(attn_sink=one).array, right(sinks=np.tile(SINKS[0], 2)))
    assert_close(attend(logits_soft_cap=1.5).array, right(softcap=1.5))
    both = attend(bias=bias, logits_soft_cap=1.5).array
    assert_close(both, right(bias=of_heads, softcap=1.5, bias_first=True))


def test_sinks_by_token():
    sinks = normal(7, 2, 3, 12)  # [batch, group, position]
    out = attend(mask=AttentionMask(True), attn_sink=NamedArray(sinks, (B, G, P)))
    assert_close(out.array, right(seen=ROW >= KEY, sinks=np.tile(sinks, (1, 2, 1))))


def test_sinks_without_batch():
    first = [NamedArray(x.array[0], x.axes[1:]) for x in (Q, K, V)]
    out = attend(*first, attn_sink=NamedArray(SINKS, (H, G)))
    assert_close(out.array, right(sinks=SINKS.reshape(-1))[0])


def test_a_traced_scale_multiplies_query():
    out = jax.jit(lambda scale: attend(scaling_factor=scale).array)(0.3)
    assert_close(out, right(scale=0.3))


def test_axes_may_stand_in_any_order():
    q = Q.rearrange((P, B, G, H, D))
    out = attend(q, K.rearrange((D, KP, H, B)), V.rearrange((KP, B, DV, H)), AttentionMask(True))
    assert out.axes == (P, B, G, H, DV)
    assert_close(out.rearrange((B, H, G, P, DV)).array, right(seen=ROW >= KEY))


def test_axes_that_are_absent():
    """Without groups, without batch, and with nothing but positions."""
    whole, mask = right(seen=ROW >= KEY), AttentionMask(True)
    first = [NamedArray(x.array[0], x.axes[1:]) for x in (Q, K, V)]
    assert_close(attend(*first, mask).array, whole[0])
    alone = [NamedArray(x.array[0, 0], x.axes[2:]) for x in (Q, K, V)]
    alone[0] = NamedArray(alone[0].array[0], (P, D))
    assert_close(attend(*alone, mask).array, whole[0, 0, 0])
    batched = [NamedArray(x.array[:, 0], (B, *x.axes[2:])) for x in (Q, K, V)]
    batched[0] = NamedArray(batched[0].array[:, 0], (B, P, D))
    assert_close(attend(*batched, mask).array, whole[:, 0, 0])


def test_keys_without_batch_serve_all_entries():
    k, v = (NamedArray(x.array[0], x.axes[1:]) for x in (K, V))
    both = [NamedArray(np.stack([x.array] * 2), (B, *x.axes)) for x in (k, v)]
    assert_close(attend(Q, k, v).array, right(Q, *both))


@pytest.mark.parametrize("split", [(G,), (H,), (H, G)], ids=["groups", "KV heads", "both"])
def test_explicit_axes_split_heads(split):
    require_devices(6)
    devices = jax.devices()[:6]
    mesh = jax.make_mesh((2, 3), ("kv_head", "group"), (AxisType.Explicit,) * 2, devices=devices)
    bias, sinks = NamedArray(normal(8, 2, 3, 12, 12), (H, G, P, KP)), NamedArray(SINKS, (H, G))

    def loss(q, k, v, bias, sinks):
        out = attend(q, k, v, AttentionMask(True), bias=bias, attn_sink=sinks).array
        return jnp.sin(out).sum(), out

    def place(x):
        spec = PartitionSpec(*(axis.name if axis in split else None for axis in x.axes))
        return NamedArray(jax.device_put(x.array, NamedSharding(mesh, spec)), x.axes)

    run = jax.jit(jax.value_and_grad(loss, range(5), has_aux=True))
    wanted = run(Q, K, V, bias, sinks)
    with jax.set_mesh(mesh):
        jax.tree.map(assert_close, run(*map(place, (Q, K, V, bias, sinks))), wanted)


def test_dropout_is_off_in_inference():
    plain = attend().array
    assert np.array_equal(attend(dropout=0.5).array, plain)
    dropped = attend(dropout=0.5, inference=False, prng=jax.random.key(0)).array
    assert not np.allclose(dropped, plain)


def test_it_differentiates():
    bias, mask = NamedArray(BIAS, (G, P, KP)), MASKS["offsets"][0]

    def loss(q, k, v, bias, sinks):
        arrays = [NamedArray(x, like.axes) for x, like in zip((q, k, v), (Q, K, V))]
        sinks, bias = NamedArray(sinks, (H, G)), NamedArray(bias, (G, P, KP))
        return jnp.sin(attend(*arrays, mask, bias=bias, attn_sink=sinks).array).sum()

    def equations(q, k, v, bias, sinks):
        arrays = [NamedArray(x, like.axes) for x, like in zip((q, k, v), (Q, K, V))]
        options = dict(bias=np.tile(bias, (2, 1, 1)), sinks=sinks.reshape(-1))
        return np.sin(right(*arrays, MASKS["offsets"][1], **options)).sum()

    arrays = [x.array for x in (Q, K, V, bias)] + [SINKS]
    wanted, along = slope(equations, arrays)
    got = sum((g * u).sum() for g, u in zip(jax.grad(loss, range(5))(*arrays), along))
    assert_close(got, wanted, 1e-4)


ERRORS = {
    "positions": (
        ValueError,
        lambda: dot_product_attention(P, P, D, Q, NamedArray(K.array, (B, H, P, D)), V),
        "QPos and KPos must have different names, got 'position' for both",
    ),
    "an axis of keys": (
        ValueError,
        lambda: attend(k=NamedArray(K.array[..., None, :], (B, H, KP, Axis("odd", 1), D))),
        "key {batch, kv_head, key_position, odd, head_size} must have {batch, head_size, key_position, kv_head}",
    ),
    "a mask's axis": (
        NotImplementedError,
        lambda: attend(mask=NamedArray(np.ones((2, 12), bool), (Axis("odd", 2), KP))),
        "mask {odd, key_position} differs along odd; allowed are {batch, group, key_position, kv_head, position}",
    ),
    "a field of another version": (
        NotImplementedError,
        lambda: attend(mask=AttentionMask(True, prefix_length=4)),
        "mask has prefix_length, which this version of jax_flash does not know, only bidirectional_window, "
        "causal_offset, explicit_mask, is_causal, segment_ids, sliding_window; mask.materialize(QPos, KPos) is an",
    ),
    "an offset of heads": (
        NotImplementedError,
        lambda: attend(mask=AttentionMask(True, NamedArray(OFFSETS, (H,)))),
        "mask's causal_offset {kv_head} differs along kv_head; allowed are {batch}",
    ),
    "traced dropout": (
        TypeError,
        lambda: jax.jit(lambda rate: attend(dropout=rate))(0.5),
        "dropout must be a Python number (it is compiled in), got a traced value; close over it",
    ),
    "dropout": (
        ValueError,
        lambda: attend(dropout=0.1, inference=False),
        "dropout is 0.1 without inference, which needs prng",
    ),
    "a key": (
        TypeError,
        lambda: attend(dropout=0.1, inference=False, prng=3),
        "prng must be one jax.random.key, got dtype int32 and shape ()",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_axis(name):
    error, call, message = ERRORS[name]
    with pytest.raises(error, match="^" + re.escape("levanter.dot_product_attention: " + message)):
        call()


def test_patch_reaches_models_that_have_taken_the_name(monkeypatch):
    def own():
        raise NotImplementedError

    names = (
        "levanter",
        "levanter.layers",
        "levanter.layers.attention",
        "levanter.models",
        "levanter.models.gpt2",
    )
    for name in (*names, "other"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    users = [sys.modules[name] for name in (*names[2:5:2], "other")]
    for module in users:
        module.dot_product_attention = own
    patch()  # this version has no levanter.grug
    assert [x.dot_product_attention for x in users] == [dot_product_attention, dot_product_attention, own]


def test_it_is_levanter_s_own(monkeypatch):
    """The result equals that of Levanter's own dot_product_attention."""
    monkeypatch.undo()
    haliax = pytest.importorskip("haliax")
    own = pytest.importorskip("levanter.layers.attention")
    q, k, v = (haliax.named(x.array, [axis.name for axis in x.axes]) for x in (Q, K, V))
    k, v = (x.rename({x.axes[-1].name: "head_size"}) for x in (k, v.rename({"value": "head_size"})))
    mask = own.AttentionMask.causal(sliding_window=4, offset=1)
    call = partial(dot_product_attention, "position", "key_position", "head_size", q, k, k)
    wanted = own.dot_product_attention(
        "position", "key_position", "head_size", q, k, k, mask, attn_backend=own.AttentionBackend.VANILLA,
        precision="highest",
    )  # fmt: skip
    got = call(mask)
    assert got.axes == wanted.axes
    assert_close(got.array, np.asarray(wanted.array))
