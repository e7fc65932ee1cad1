"""jax_flash.compat.tokamax, against numpy, and against tokamax itself where it is installed."""

import dataclasses
import re
import warnings

import jax
import jax.numpy as jnp
import masked_reference
import numpy as np
import pytest
from flash_attn_reference import assert_close, i32, normal, slope
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from meshes import within
from programs import require_devices

from jax_flash import masks
from jax_flash.compat.costs import CostWarning
from jax_flash.compat.tokamax import dot_product_attention, tokamax_attention

S = 12
Q, K, V = normal(0, 2, S, 4, 16), normal(1, 2, S, 2, 16), normal(2, 2, S, 2, 8)
ROW, KEY = np.arange(S)[:, None], np.arange(S)
BIAS, DENSE = normal(3, 1, 4, S, S), np.random.default_rng(4).random((2, 1, S, S)) < 0.6
LENGTHS = i32(7, 12), i32(5, 9)
PADDED = (LENGTHS[0][:, None, None, None] > ROW) & (LENGTHS[1][:, None, None, None] > KEY)


@dataclasses.dataclass(frozen=True)
class CausalMask:
    offset: object = 0
    window_size: object = None

    def seen(self, i=KEY, j=KEY):
        i, j = i[..., :, None] + np.asarray(self.offset), j[..., None, :]
        return (j <= i) & (True if self.window_size is None else j > i - np.asarray(self.window_size))


@dataclasses.dataclass(frozen=True)
class Mask:
    """The fields of tokamax's Mask, with their documented meaning."""

    bool_mask: object = None
    q_start: object = None
    q_end: object = None
    k_start: object = None
    k_end: object = None
    is_causal: bool = False
    causal_mask: object = None

    def seen(self, i=KEY, j=KEY):
        band = True if self.causal_mask is None else self.causal_mask.seen(i, j)
        i, j = i[..., :, None], j[..., None, :]
        found = band & np.ones((1, 1, S, S), bool) & (i >= j if self.is_causal else True)
        found = found & (True if self.bool_mask is None else self.bool_mask)
        for bound, holds in ((self.q_start, i.__ge__), (self.q_end, i.__lt__)):
            found = found & (True if bound is None else holds(bound[..., None, :]))
        for bound, holds in ((self.k_start, j.__ge__), (self.k_end, j.__lt__)):
            found = found & (True if bound is None else holds(bound[..., :, None]))
        return found


CALLS = {
    "plain": ({}, True),
    "bias": (dict(bias=BIAS), True),
    "mask": (dict(mask=DENSE), DENSE),
    "causal": (dict(is_causal=True), ROW >= KEY),
    "causal mask of keys": (dict(is_causal=True, mask=DENSE[:, :, :1]), (ROW >= KEY) & DENSE[:, :, :1]),
    "window": (dict(local_window_size=(3, 1)), (KEY >= ROW - 3) & (KEY <= ROW + 1)),
    "window of one number": (dict(local_window_size=2, is_causal=True), (KEY >= ROW - 2) & (KEY <= ROW)),
    "lengths": (dict(query_seq_lengths=LENGTHS[0], key_value_seq_lengths=LENGTHS[1]), PADDED),
    "scale": (dict(scale=0.4), True),
    "cap": (dict(logits_soft_cap=1.5), True),
    "cap of the sum with a bias": (dict(logits_soft_cap=1.5, bias=BIAS), True),
}
RANGES = {
    "window": Mask(k_start=np.maximum(KEY - 3, 0)[None], is_causal=True),
    "a causal mask's offset": Mask(causal_mask=CausalMask(3), k_start=i32([1])),
    "a causal mask's window": Mask(causal_mask=CausalMask(-1, 4)),
    "a causal mask of arrays": Mask(causal_mask=CausalMask(jnp.int32(2), jnp.int32(5))),
    "a causal mask alone": CausalMask(1, 3),
    "of heads": Mask(k_start=(KEY // 2 + i32([0], [1], [2], [3])) % 5, k_end=(KEY + 2)[None]),
    "of entries": Mask(k_start=i32(3, 5)[:, None, None], k_end=i32(11, 7)[:, None, None]),
    "of queries": Mask(q_start=i32([2]), q_end=i32([9]), is_causal=True),
    "past everything": Mask(
        k_end=np.full((1, S), 2**31 - 1, np.int32), q_end=np.array([[2**31 - 1]], np.uint32)
    ),
    "with an array": Mask(DENSE, k_end=(KEY + 1)[None]),
}
BECOME_DENSE = {
    "starts": Mask(q_start=KEY[None]),
    "ends": Mask(q_end=(S - KEY)[None], k_end=i32([9])),
    "with an array": Mask(DENSE, q_start=KEY[None] // 2, is_causal=True),
}


def right(options, seen, q=Q, k=K, v=V):
    softcap, scale = options.get("logits_soft_cap"), options.get("scale")
    scores = dict(bias=options.get("bias"), bias_first=True, softcap=softcap, scale=scale)
    return masked_reference.attend(q, k, v, seen, **scores)[0]


@pytest.mark.parametrize("name", CALLS)
def test_the_function_is_the_equations(name, implementation):
    options, seen = CALLS[name]
    out = dot_product_attention(Q, K, V, **options, implementation=implementation)
    assert_close(out, right(options, seen))


@pytest.mark.parametrize("name", RANGES)
def test_ranges_of_keys_stay_ranges(name, implementation):
    out = tokamax_attention(Q, K, V, mask=RANGES[name], implementation=implementation)
    assert_close(out, right({}, RANGES[name].seen()))


def test_ranges_of_keys_are_no_dense_mask():
    """The program of many keys has no array of S × S elements."""
    s = 4096
    x = jax.ShapeDtypeStruct((1, s, 1, 16), jnp.float32)
    mask = Mask(k_start=np.maximum(np.arange(s) - 9, 0)[None], q_end=i32([100]), is_causal=True)
    program = jax.jit(lambda q: tokamax_attention(q, q, q, mask=mask)).lower(x).as_text()
    assert f"{s}x{s}" not in program


@pytest.mark.parametrize("name", BECOME_DENSE)
def test_bounds_of_queries_by_key_become_dense_with_a_warning(name):
    mask = BECOME_DENSE[name]
    with pytest.warns(
        CostWarning, match="mask becomes a dense boolean mask of 144 bytes, since q_start or q_end"
    ):
        out = tokamax_attention(Q, K, V, mask=mask)
    assert_close(out, right({}, mask.seen()))


@pytest.mark.parametrize("bounds", ["causal", "a window", "bounds of queries"])
def test_positions_of_queries(bounds):
    i = np.random.default_rng(5).permutation(S)
    mask = {
        "causal": Mask(is_causal=True),
        "a window": Mask(causal_mask=CausalMask(0, 4)),
        "bounds of queries": Mask(q_start=i32([2]), q_end=i32([9])),
    }[bounds]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = tokamax_attention(Q, K, V, mask=mask, q_indices=i[None])
    assert_close(out, right({}, mask.seen(i)))


@pytest.mark.parametrize("causal", [CausalMask(), CausalMask(1, 4)])
def test_positions_of_keys_make_a_mask_dense(causal):
    j = np.random.default_rng(6).permutation(S)
    mask = Mask(k_end=i32([7]), causal_mask=causal)
    with pytest.warns(CostWarning, match="since k_indices are given"):
        out = tokamax_attention(Q, K, V, mask=mask, k_indices=j[None])
    assert_close(out, right({}, mask.seen(j=j)))


def test_any_number_of_batch_dims():
    options = dict(bias=BIAS, mask=DENSE, key_value_seq_lengths=LENGTHS[1])
    wanted = dot_product_attention(Q, K, V, **options)
    entry = dot_product_attention(Q[1], K[1], V[1], bias=BIAS[0], mask=DENSE[1], key_value_seq_lengths=9)
    assert_close(entry, wanted[1])
    more = [x[:, None, None] for x in (Q, K, V)]
    options = dict(
        bias=BIAS[None, None], mask=DENSE[:, None, None], key_value_seq_lengths=LENGTHS[1][:, None, None]
    )
    assert_close(dot_product_attention(*more, **options)[:, 0, 0], wanted)


@pytest.mark.parametrize("names", ["query", "query, key", "key, lengths", "lengths"])
def test_explicit_axes_may_split_batch_dims_of_some_arrays_alone(names, kernel):
    require_devices(2)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    arrays = dict(query=Q, key=K, value=V, lengths=LENGTHS[1])
    arrays = {name: jnp.asarray(x[:, None]) for name, x in arrays.items()}

    def call(query, key, value, lengths):
        options = dict(key_value_seq_lengths=lengths, implementation=kernel)
        return dot_product_attention(query, key, value, **options)

    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, PartitionSpec("x"))
        placed = {name: jax.device_put(x, place) if name in names else x for name, x in arrays.items()}
        for run in (call, jax.jit(call)):
            assert_close(run(**placed)[:, 0], right({}, LENGTHS[1][:, None, None, None] > KEY))


def test_a_query_without_a_visible_key_gives_zero():
    out, (top, total) = tokamax_attention(Q, K, V, mask=Mask(q_end=i32([9])), return_residuals=True)
    assert not out[:, 9:].any()
    assert out[:, :9].all()
    assert not total[..., 9:].any()
    assert np.isfinite(top).all()


def test_residuals_combine_partial_results():
    keys = slice(0, 5), slice(5, S)
    parts = [
        tokamax_attention(
            Q, K[:, x], V[:, x], return_residuals=True, normalize_output=False, logits_scale=0.3
        )
        for x in keys
    ]
    outs, tops, totals = zip(*((o, m, n) for o, (m, n) in parts))
    top = np.max(tops, 0)
    weights = [np.exp(m - top).swapaxes(1, 2)[..., None] for m in tops]
    total = sum(w * n.swapaxes(1, 2)[..., None] for w, n in zip(weights, totals))
    assert_close(sum(w * o for w, o in zip(weights, outs)) / total, right(dict(scale=0.3), True))


def test_it_differentiates():
    mask = RANGES["with an array"]

    def loss(q, k, v, bias):
        return jnp.sin(tokamax_attention(q, k, v, bias=bias, mask=mask)).sum()

    def equations(q, k, v, bias):
        return np.sin(masked_reference.attend(q, k, v, mask.seen(), bias=bias)[0]).sum()

    wanted, along = slope(equations, (Q, K, V, BIAS))
    got = sum((g * u).sum() for g, u in zip(jax.grad(loss, (0, 1, 2, 3))(Q, K, V, BIAS), along))
    assert_close(got, wanted, 1e-4)


@pytest.mark.parametrize(
    "axes",
    [(None, None, ("x", "y")), ("x",), (None, None, "x"), ("x", None, "y")],
    ids=["more parts than KV heads", "batch", "heads", "both"],
)
def test_a_sharding_of_query_splits_the_call(axes, axis_type, kernel):
    require_devices(4)
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(axis_type,) * 2, devices=jax.devices()[:4])
    place = NamedSharding(mesh, PartitionSpec(*axes))
    call = jax.jit(lambda *x: dot_product_attention(*x, q_sharding=place, implementation=kernel))
    with within(mesh):
        out = call(Q, K, V)
        assert out.sharding.is_equivalent_to(place, 4)
        assert_close(out, right({}, True))


class Quantised:
    qvalue = scale = None


ERRORS = {
    "quantised": (
        NotImplementedError,
        lambda: tokamax_attention(Q, Quantised(), V),
        "tokamax_attention: key is quantised (Quantised); pass qwix.dequantize(key)",
    ),
    "bias": (
        TypeError,
        lambda: dot_product_attention(Q, K, V, bias="x"),
        "tokamax.dot_product_attention: bias must be an array, got 'x'",
    ),
    "traced dropout": (
        TypeError,
        lambda: jax.jit(lambda rate: tokamax_attention(Q, K, V, dropout_rate=rate))(0.5),
        "tokamax_attention: dropout_rate must be a Python number (it is compiled in), got a traced value",
    ),
    "dropout": (
        NotImplementedError,
        lambda: tokamax_attention(Q, K, V, dropout_mask=DENSE, dropout_rate=0.5),
        "tokamax_attention: dropout_mask is an array of all weights",
    ),
    "pages": (
        NotImplementedError,
        lambda: tokamax_attention(Q, K, V, paging_info=()),
        "tokamax_attention: paging_info is for jax_flash.paged_attention",
    ),
    "not normalised": (
        NotImplementedError,
        lambda: tokamax_attention(Q, K, V, normalize_output=False),
        "tokamax_attention: normalize_output is False without return_residuals",
    ),
    "normalised": (
        TypeError,
        lambda: tokamax_attention(Q, K, V, normalize_output=0),
        "tokamax_attention: normalize_output must be True or False, got 0",
    ),
    "batch": (
        ValueError,
        lambda: dot_product_attention(Q, K[:1], V),
        "tokamax.dot_product_attention: key has batch dims (1,), which differ from query's (2,)",
    ),
    "mask": (
        ValueError,
        lambda: dot_product_attention(Q, K, V, mask=DENSE[..., :5]),
        "tokamax.dot_product_attention: mask must broadcast to [batch... hq sq sk] = (2, 4, 12, 12), got shape",
    ),
    "additive mask": (
        TypeError,
        lambda: dot_product_attention(Q, K, V, mask=np.zeros((12, 12), np.float32)),
        "tokamax.dot_product_attention: mask has dtype float32, allowed are bool; pass an additive mask as bias",
    ),
    "a mask of this library": (
        TypeError,
        lambda: dot_product_attention(Q, K, V, mask=masks.causal()),
        "tokamax.dot_product_attention: mask must be an array, got ",
    ),
    "positions": (
        TypeError,
        lambda: tokamax_attention(Q, K, V, is_causal=True, q_indices=np.arange(12.0)),
        "tokamax_attention: q_indices must hold integers, got float",
    ),
    "implementation": (
        ValueError,
        lambda: dot_product_attention(Q, K, V, implementation="mosaic"),
        "tokamax.dot_product_attention: implementation must be None or one of ('cpu', 'cuda', 'xla'), got 'mosaic'; "
        "a model that passes one of tokamax's names runs here if it passes [tokamax_attention]",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name):
    error, call, message = ERRORS[name]
    with pytest.raises(error, match="^" + re.escape(message)):
        call()


def test_tokamax_calls_it():
    """`tokamax.dot_product_attention(…, implementation=[tokamax_attention])` gives what tokamax itself gives."""
    tokamax = pytest.importorskip("tokamax")
    options = dict(is_causal=True, local_window_size=(3, 0), bias=BIAS, mask=DENSE)
    own, ours = (
        tokamax.dot_product_attention(Q, K, V, **options, implementation=x, precision="highest")
        for x in ("xla", [tokamax_attention])
    )
    assert_close(np.where((ours == 0).all(-1, keepdims=True), own, ours), np.asarray(own))
