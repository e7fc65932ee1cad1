"""Masks as values in calls: every form in every layout against the oracle, and drawn by attention itself."""

from functools import cache, partial

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ARRAYS, FORMS, VARLEN, Case, varlen
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from pages import paged
from programs import require_devices
from test_masks import draw, draw_packed

import jax_flash
from jax_flash import flash_attention, flash_attention_varlen, masks
from jax_flash.flax import attention_fn

OF_FORMS = FORMS + ARRAYS + tuple(case for case in VARLEN if case.forms)


@pytest.mark.parametrize("case", OF_FORMS, ids=lambda case: case.name)
def test_a_mask_shows_what_its_definition_says(case, implementation):
    checks.check(case, implementation)


PICTURES = {
    "causal with an offset": masks.causal(1),
    "window": masks.window(2, 1),
    "ranges": masks.ranges([0, 2, 1, 3, 0, 6, 2], [2, 5, 1, 4, 7, 9, 3]),
    "two ranges": masks.ranges([0] * 7, [1, 2, 1, 2, 1, 2, 1]) | masks.ranges([3, 4, 5, 6, 2, 2, 1], [7] * 7),
    "prefix": masks.prefix_lm(3),
    "spans": masks.bidirectional_spans([[-1, 4, 4, 4, -1, 2, 2]]),
    "chunks": masks.chunked(3),
    "first and window": masks.first_and_window(1, 1),
    "diffusion": masks.block_diffusion(2),
    "segments": masks.segments([[0, 0, 1, 1, 1, 2, 2]]),
    "segments in chunks": masks.chunked(4) & masks.segments([[0, 0, 1, 1, 1, 2, 2]]),
    "positions": masks.by_position([[0, 0, 1, 2, 3, 4, 5]], [[0, 1, 1, 2, 4, 4, 5]]),
    "a function": masks.from_function(lambda b, h, i, j: (i + j) % 3 > 0, 7, 7),
}


@pytest.mark.parametrize("name", PICTURES)
def test_attention_draws_the_mask(name, implementation):
    assert draw(implementation, mask=PICTURES[name], s_q=7, s_k=7) == PICTURES[name].picture(7, 7)


def test_a_mask_and_the_calls_own_options_both_hold(implementation):
    picture = partial(draw, implementation, s_q=4, s_k=4)
    assert picture(mask=masks.prefix_lm(3), window=(1, None)) == ["###.", "###.", ".##.", "..##"]
    assert picture(mask=masks.prefix_lm(3), causal=True) == ["#...", "##..", "###.", "####"]
    ids = jnp.array([[0, 1, 1, 0]])
    assert picture(mask=masks.causal(), segment_ids=ids) == ["#...", ".#..", ".##.", "#..#"]
    assert picture(mask=masks.segments(ids), segment_ids=jnp.array([[0, 0, 1, 1]])) == [
        "#...",
        ".#..",
        "..#.",
        "...#",
    ]


def test_packed_sequences_count_from_their_own_first_key(implementation):
    picture = partial(draw_packed, implementation, q=[0, 3, 7])
    assert picture(mask=masks.prefix_lm(jnp.array([2, 3], jnp.int32))) == [
        "##.....", "##.....", "###....", "...###.", "...###.", "...###.", "...####",
    ]  # fmt: skip
    assert picture(mask=masks.chunked(2)) == [
        "#......", "##.....", "..#....", "...#...", "...##..", ".....#.", ".....##",
    ]  # fmt: skip
    spans = masks.bidirectional_spans([5, 5, 5, 5, 5, -1, -1])
    assert picture(mask=spans)[2:5] == ["###....", "...##..", "...##.."]


def test_a_function_counts_the_rows_of_each_packed_sequence(implementation):
    """Row i of the function is row i of each sequence, as in `blocks`. Rows past its `sq` rows see no key."""
    mask = masks.from_function(lambda b, h, i, j: (j == i) | (j < b), 3, 4, batch=2)
    assert draw_packed(implementation, q=[0, 3, 7], mask=mask) == [
        "#......", ".#.....", "..#....", "...#...", "...##..", "...#.#.", ".......",
    ]  # fmt: skip


def test_spans_end_with_the_rows_of_their_sequence(implementation):
    spans = masks.bidirectional_spans([5, 5, 5, 5])
    drawn = draw_packed(implementation, q=[0, 2, 4], k=[0, 4, 8], mask=spans)
    assert drawn == ["##......", "##......", "....##..", "....##.."]


@pytest.mark.parametrize(
    "form",
    [
        "causal",
        "band",
        "window",
        "ranges",
        "prefix",
        "spans",
        "first",
        "either",
        "blocks",
        "dense",
        "function",
    ],
)
@pytest.mark.parametrize("tokens", [2, 24])
def test_paged_calls_take_masks(form, tokens, implementation):
    fixed = Case("pages", b=3, sq=tokens, sk=70, kv_lengths=(70, 3, 41), forms=(form,))
    packed = varlen("pages", (tokens, 1, tokens), k_sequences=(70, 3, 41), forms=(form,), causal=True)
    for case in (fixed, packed):
        call = paged(case)
        out, lse = call.call(implementation)({})
        right, _ = checks.references(case)
        checks.oracle.assert_out(np.asarray(out), right.out, right.out)
        checks.oracle.assert_lse(np.asarray(lse), right.lse)


@pytest.mark.parametrize("packed", [False, True])
def test_keys_in_pages_have_positions_and_segments(packed, implementation):
    rng, lengths = np.random.default_rng(0), np.array([[21], [3]])
    tables = jnp.array([[2, 0, 3], [1, 9, 9]], jnp.int32)
    pool = [jnp.asarray(rng.standard_normal((4, 8, 2, 16)), jnp.float32) for _ in range(2)]
    q = jnp.asarray(rng.standard_normal((2, 5, 4, 16)), jnp.float32)
    place = np.where(np.arange(24) < lengths, np.sort(rng.integers(0, 30, (2, 24))), -1)
    document = np.where(np.arange(24) < lengths, np.arange(24) // 7 % 3 * 5 - 3, -3)
    rows = rng.integers(0, 30, (2, 5)), rng.choice([-3, 2, 7], (2, 5))
    seen = (place[:, None] <= rows[0][..., None]) & (document[:, None] == rows[1][..., None])
    own = [x.reshape(-1) for x in rows] if packed else rows
    mask = masks.by_position(own[0], place) & masks.segments(own[1], document)
    mask = mask & masks.segments(np.sign(own[1]), np.sign(document))
    offsets = jnp.array([0, 5, 10], jnp.int32) if packed else None
    out = jax_flash.paged_attention(
        q.reshape(10, 4, 16) if packed else q, *pool, tables, lengths[:, 0], cu_seqlens_q=offsets,
        mask=mask, implementation=implementation,
    )  # fmt: skip
    keys, values = (x[jnp.minimum(tables, 3)].reshape(2, 24, 2, 16) for x in pool)
    wanted = flash_attention(
        q, keys, values, kv_lengths=lengths[:, 0], mask=jnp.asarray(seen)[:, None], implementation="xla"
    )
    np.testing.assert_allclose(out.reshape(q.shape), wanted, rtol=1e-5, atol=1e-5)


# --- JAX -----------------------------------------------------------------------------------------------------------

B, S, H, D = 2, 48, 4, 16
X = [jax.random.normal(jax.random.key(n), (B, S, H if n == 0 else 2, D)) for n in range(3)]


def loss(q, k, v, mask, implementation):
    return (flash_attention(q, k, v, mask=mask, implementation=implementation) ** 2).sum()


def test_a_scan_may_mix_local_and_global_layers(implementation):
    lefts = jnp.array([3, 2**30, 7], jnp.int32)

    def layer(x, left):
        return x + flash_attention(x, *X[1:], mask=masks.window(left, 0), implementation=implementation), None

    @jax.jit
    def net(x):
        return jax.lax.scan(jax.checkpoint(layer), x, lefts)[0]

    x = X[0]
    for left in (3, None, 7):
        x = x + flash_attention(
            x, *X[1:], causal=True, window=(left, None), align="top_left", implementation=implementation
        )
    np.testing.assert_allclose(net(X[0]), x, rtol=1e-5, atol=1e-5)
    assert np.isfinite(jax.grad(lambda x: net(x).sum())(X[0])).all()


def test_a_mask_is_vmapped_like_an_array(implementation):
    lengths = jnp.array([[5, 20], [40, 1], [9, 9]], jnp.int32)
    several = jax.vmap(lambda n: jax.grad(loss)(*X, masks.prefix_lm(n), implementation))(lengths)
    as_values = jax.vmap(lambda m: jax.grad(loss)(*X, m, implementation))(jax.vmap(masks.prefix_lm)(lengths))
    for n, one, other in zip(lengths, several, as_values):
        wanted = jax.grad(loss)(*X, masks.prefix_lm(n), implementation)
        np.testing.assert_allclose(one, wanted, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(other, wanted, rtol=1e-5, atol=1e-5)


MESHES = {"batch and heads": P("x", None, "y"), "sequence": P(None, "x"), "batch and sequence": P("y", "x")}


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("name", MESHES)
def test_masks_are_split_with_the_rows_that_they_belong_to(name, blocks, implementation):
    require_devices(4)
    mesh = Mesh(np.reshape(jax.devices()[:4], (2, 2)), ("x", "y"))
    sharding = NamedSharding(mesh, MESHES[name])
    arrays = [jax.device_put(x, sharding) for x in X]
    chosen = jnp.asarray(np.random.default_rng(1).integers(-1, 3, (1, H, 3, 2)), jnp.int32)
    mask = masks.prefix_lm(jnp.array([30, 7], jnp.int32)) & masks.first_and_window(3, 11)
    mask = mask & masks.blocks(chosen, (16, 16)) if blocks else mask
    run = jax.jit(jax.value_and_grad(partial(loss, implementation=implementation), (0, 1, 2)))
    got, wanted = run(*arrays, mask), run(*X, mask)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


RINGED = {
    "prefix": masks.prefix_lm(jnp.array([30, 7], jnp.int32)),
    "band": masks.window(5, 2),
    "chunks": masks.chunked(10),
    "chunks of a part": masks.chunked(12),
    "first": masks.first_and_window(3, 11),
}


FEW_RINGED = {"prefix", "band", "ranges"}


def ring_mask(name):
    """A function that makes the mask for a part of the rows, and its arguments for all rows."""
    ids = jnp.asarray(np.repeat(np.array([[-1, 2, -1, 5, 6, 6, -1, 1]]), 6, -1), jnp.int32)
    position = jnp.asarray(np.arange(S)[None] // 2, jnp.int32)
    lo, hi = (jnp.asarray(x, jnp.int32) for x in np.random.default_rng(0).integers(0, S, (2, B, 1, S)))
    return {
        "spans": (masks.bidirectional_spans, (ids,)),
        "positions": (masks.by_position, (position, position)),
        "ranges": (masks.ranges, (lo, hi)),
    }.get(name, (lambda: RINGED[name], ()))


def with_gradients(run, arrays):
    out, pullback = jax.vjp(run, *arrays)
    return out, *pullback(jnp.cos(out))


@cache
def whole(name):
    make, arrays = ring_mask(name)
    call = partial(flash_attention, mask=make(*arrays), implementation="xla")
    return jax.jit(partial(with_gradients, call))(X)


def zigzags(order):
    """The permutation of tokens into the ring's order, and its inverse."""
    if order == "contiguous":
        return (lambda x, axis=1: x), lambda x: x
    return partial(jax_flash.zigzag_permute, devices=2), partial(jax_flash.zigzag_unpermute, devices=2)


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("mode", ["ring", "all_to_all"])
@pytest.mark.parametrize("name", [*RINGED, "spans", "positions", "ranges"])
def test_a_ring_counts_by_global_positions(name, mode, order, implementation):
    require_devices(2)
    if implementation == "xla" and (mode, order) not in {("ring", "zigzag"), ("all_to_all", "contiguous")}:
        pytest.skip("one order of rows for each mode is enough for plain JAX")
    if (implementation == "xla" or (mode, order) == ("all_to_all", "zigzag")) and name not in FEW_RINGED:
        pytest.skip("the ranges of the other masks are made as outside of a ring, or as in contiguous order")
    make, arrays = ring_mask(name)

    def local(q, k, v, *arrays):
        call = partial(jax_flash.ring_attention, axis_name="x", order=order, mode=mode)
        return call(q, k, v, mask=make(*arrays), implementation=implementation)

    mesh = Mesh(np.asarray(jax.devices()[:2]), ("x",))
    shard = P(None, "x")
    specs = (shard,) * 3 + tuple(P(*(None,) * (x.ndim - 1), "x") for x in arrays)
    ring = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=shard)
    permute, back = zigzags(order)

    def through_ring(q, k, v):
        return back(ring(*map(permute, (q, k, v)), *(permute(x, axis=x.ndim - 1) for x in arrays)))

    for got, wanted in zip(jax.jit(partial(with_gradients, through_ring))(X), whole(name)):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


LONG = [jax.random.normal(jax.random.key(n), (B, 128, H if n == 0 else 2, D)) for n in range(3)]
CHOSEN = jnp.asarray(np.random.default_rng(0).integers(-1, 4, (B, H, 8, 2)), jnp.int32)


@cache
def whole_of_blocks():
    mask = masks.blocks(CHOSEN, (16, 32))
    call = partial(flash_attention, causal=True, mask=mask, implementation="xla")
    return jax.jit(partial(with_gradients, call))(LONG)


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("mode", ["ring", "all_to_all"])
def test_a_ring_takes_the_blocks_of_its_rows(mode, order, implementation):
    require_devices(2)
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("x",))
    ring = partial(jax_flash.ring_attention, axis_name="x", order=order, mode=mode, causal=True)

    def local(q, k, v, chosen):
        return ring(q, k, v, mask=masks.blocks(chosen, (16, 32)), implementation=implementation)

    shard = P(None, "x")
    split = jax.shard_map(local, mesh=mesh, in_specs=(shard,) * 3 + (P(None, None, "x"),), out_specs=shard)
    permute, back = zigzags(order)

    def through_ring(q, k, v):
        return back(split(*map(permute, (q, k, v)), permute(CHOSEN, axis=2)))

    for got, wanted in zip(jax.jit(partial(with_gradients, through_ring))(LONG), whole_of_blocks()):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


# --- functions -----------------------------------------------------------------------------------------------------


def test_other_interfaces_take_masks(implementation):
    mask = masks.prefix_lm(jnp.array([30, 7], jnp.int32))
    wanted = flash_attention(*X, mask=mask, implementation="xla")
    for call in (jax_flash.dot_product_attention, attention_fn):
        np.testing.assert_allclose(
            call(*X, mask=mask, implementation=implementation), wanted, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    "case",
    [case for number, case in enumerate(FORMS) if len(case.forms) == 1 or number % 3 == 0],
    ids=lambda case: case.name,
)
def test_flops_count_what_a_mask_shows(case):
    inputs = checks.make_inputs(case)
    call = flash_attention if case.layout == "fixed" else flash_attention_varlen
    counted = jax_flash.flops(call, *inputs.positional.values(), **inputs.keywords, **case.options)
    static = checks.oracle.spec(case, inputs)
    pairs = checks.oracle.equations.visible_pairs(static, checks.oracle.operands(inputs))
    assert counted == 2 * (case.d + case.dv) * pairs
