"""Masks as values in JAX's programs: forward mode, bias gradients, scans over masks, rings, memory, limits of int32."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from programs import require_devices

from jax_flash import (
    export_checks,
    flash_attention,
    flash_attention_varlen,
    flops,
    masks,
    paged_attention,
    ring_attention,
    zigzag_permute,
    zigzag_unpermute,
)

B, S, H, D = 2, 48, 4, 16
X = [jax.random.normal(jax.random.key(n), (B, S, H if n == 0 else 2, D)) for n in range(3)]
MOST = 2**31 - 1
RNG = np.random.default_rng(0)
LIMITS = [jnp.asarray(x, jnp.int32) for x in RNG.integers(0, S, (4, 1, H, S))]

FORMS = {
    "causal with an offset": masks.causal(jnp.array([2, -3], jnp.int32)),
    "ranges": masks.ranges(*LIMITS[:2]) | masks.ranges(*LIMITS[2:]),
    "prefix and segments": masks.prefix_lm(9) & masks.segments(jnp.arange(S)[None] // 20),
    "diffusion": masks.block_diffusion(5),
    "first and window": masks.first_and_window(3, 7),
    "blocks": masks.blocks(jnp.asarray(RNG.integers(-1, 3, (1, H, 3, 2)), jnp.int32), (16, 16)),
    "blocks and chunks": masks.chunked(20)
    & masks.blocks(jnp.asarray([[[[0], [1], [0]]]], jnp.int32), (16, 32)),
    "dense": masks.dense(jnp.asarray(RNG.random((B, 1, S, S)) < 0.5)),
}


def array_of(mask, entries=B, heads=H):
    """The mask as booleans, [b, h, sq, sk]."""
    rows = [[mask.picture(S, entry=z, head=h) for h in range(heads)] for z in range(entries)]
    return jnp.asarray([[[[x == "#" for x in row] for row in head] for head in entry] for entry in rows])


BIASED = (*X, jax.random.normal(jax.random.key(4), (1, H, S, S)))


def both_modes(mask, implementation):
    """Out and its tangent, then the gradients."""

    def call(q, k, v, bias):
        return flash_attention(q, k, v, mask=mask, bias=bias, implementation=implementation)

    moves = tuple(jnp.cos(5 * x) for x in BIASED)
    return *jax.jvp(call, BIASED, moves), *jax.vjp(call, *BIASED)[1](moves[0])


@cache
def of_an_array(name):
    return both_modes(array_of(FORMS[name]), "xla")


@pytest.mark.parametrize("name", FORMS)
def test_forward_mode_and_the_gradient_of_a_bias(name, implementation):
    for got, wanted in zip(both_modes(FORMS[name], implementation), of_an_array(name), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_scan_runs_over_masks_as_over_arrays(implementation):
    each = [masks.prefix_lm(jnp.int32(n)) & masks.ranges(LIMITS[0], LIMITS[0] + 20 + n) for n in (0, 11, 30)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *each)

    def layer(x, mask):
        return x + flash_attention(x, *X[1:], mask=mask, implementation=implementation), None

    def loss(x, masks_of_layers):
        return (jax.lax.scan(jax.checkpoint(layer), x, masks_of_layers)[0] ** 2).sum()

    def one_by_one(x):
        for mask in each:
            x, _ = layer(x, mask)
        return (x**2).sum()

    np.testing.assert_allclose(
        jax.jit(jax.grad(loss))(X[0], stacked), jax.grad(one_by_one)(X[0]), rtol=1e-4, atol=1e-4
    )


def test_the_largest_numbers_do_not_wrap_around():
    """A window or a position near the ends of int32 hides nothing on that side."""
    most = jnp.int32(MOST)
    assert masks.window(most, most).picture(3) == ["###"] * 3
    assert masks.window(most, 0).picture(3) == ["#..", "##.", "###"]
    assert masks.window(0, most, 1).picture(3) == [".##", "..#", "..."]
    assert masks.causal(most).picture(2) == ["##", "##"]
    assert masks.causal(-most - 1).picture(2) == ["..", ".."]
    assert masks.first_and_window(most, most).picture(2) == ["#.", "##"]
    assert masks.window(2**40, 0).picture(2) == masks.chunked(2**40).picture(2) == ["#.", "##"]
    assert masks.window(0, 2**40).picture(2) == ["##", ".#"]
    assert masks.prefix_lm(2**40).picture(2) == ["##", "##"]
    assert masks.block_diffusion(2**40).picture(4) == masks.block_diffusion(2).picture(4)
    far = masks.by_position(
        [[MOST - 1, MOST]], [[MOST - 2, MOST - 1, MOST]], window=(MOST, MOST), causal=False
    )
    assert far.picture(2, 3) == ["###", "###"]
    near = masks.by_position([[-MOST, MOST]], [[-MOST, 0, MOST]], window=(1, 0))
    assert near.picture(2, 3) == ["#..", "..#"]


def test_a_call_with_a_mask_is_exported(kernel):
    run = jax.jit(lambda q, k, v, mask: flash_attention(q, k, v, mask=mask, implementation=kernel))
    mask = masks.first_and_window(3, 11)
    exported = jax.export.export(run, disabled_checks=export_checks())(*X, mask)
    np.testing.assert_allclose(exported.call(*X, mask), run(*X, mask), rtol=1e-6)


def test_a_program_that_takes_masks_is_serialised():
    """The serialised program keeps the Python numbers that its masks hold."""
    ids, chosen = np.zeros((2, S), int), np.zeros((1, 1, 3, 1), int)
    given = [
        masks.blocks(chosen, (16, 32)) & masks.chunked(7) & masks.segments(ids),
        masks.ranges(ids[:, None], 9) | masks.window(jnp.array([3, 5]), 0),
        masks.by_position(ids, ids, window=(3, None))
        & masks.bidirectional_spans(ids)
        & masks.block_diffusion(4),
        masks.first_and_window(1, 2) & masks.prefix_lm(3) & masks.dense(np.ones((1, 1, S, S), bool)),
        masks.from_function(lambda b, h, i, j: j <= i, 4, 4),
    ]
    program = jax.export.export(jax.jit(lambda given: given))(given)
    again = jax.export.deserialize(program.serialize())
    assert again.in_tree == program.in_tree == jax.tree.structure(((given,), {}))
    assert jax.tree.structure(again.call(given)) == jax.tree.structure(given)


def test_numbers_of_a_mask_are_no_nodes_of_its_tree():
    """Orbax would take such a node, an int, for an array that it has stored."""
    ids = np.zeros((2, S), int)
    for mask in (
        masks.causal() | masks.prefix_lm(3),
        masks.first_and_window(1, 2),
        masks.by_position(ids, ids),
    ):
        nodes = jax.tree.leaves(mask, is_leaf=lambda x: isinstance(x, int))
        assert not [x for x in nodes if isinstance(x, int)]


@pytest.mark.parametrize("make", [masks.segments, masks.by_position])
def test_no_keys_at_all(make, implementation):
    q, none, starts = jnp.ones((3, 2, 8)), jnp.ones((0, 2, 8)), jnp.array([0, 3], jnp.int32)
    empty = jnp.zeros(0, jnp.int32)
    calls = (
        lambda: flash_attention(
            q[None], none[None], none[None], mask=make([0, 0, 1], empty), implementation=implementation
        ),
        lambda: flash_attention_varlen(
            q, none, none, starts, 0 * starts, mask=make([0, 0, 1], empty), implementation=implementation
        ),
        lambda: paged_attention(
            q[None],
            *[jnp.ones((1, 4, 2, 8))] * 2,
            jnp.zeros((1, 0), jnp.int32),
            0,
            mask=make([0, 0, 1], empty),
            implementation=implementation,
        ),
    )
    for call in calls:
        np.testing.assert_array_equal(call(), 0)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="programs for GPUs unroll the search")
def test_a_search_for_keys_is_a_loop_in_the_program():
    """Unrolled, XLA of jax 0.12 compiled a search among 64 packed keys for minutes."""

    def gathers(keys):
        x, offsets = jnp.ones((keys, 1, D)), jnp.array([0, keys], jnp.int32)
        position = jnp.arange(keys, dtype=jnp.int32)
        mask = masks.by_position(position, position, window=(3, None))
        call = jax.jit(lambda x, mask: flash_attention_varlen(x, x, x, offsets, mask=mask))
        return call.lower(x, mask).as_text().count("stablehlo.gather")

    assert gathers(4096) == gathers(16)


RINGS = {
    "segments": lambda x: masks.causal() & masks.segments(x),
    "diffusion": lambda x: masks.block_diffusion(6),
    "an offset for each entry": lambda x: masks.causal(jnp.array([3, -40], jnp.int32)),
    "chunks or a window": lambda x: masks.chunked(12) | masks.window(3, 2),
    "a prefix of a number": lambda x: masks.prefix_lm(20),
    "nothing": lambda x: masks.ranges(0 * x[:, None], 0 * x[:, None]),
    "dense": lambda x: masks.dense((x[:, None, :, None] + jnp.arange(S)) % 3 > 0),
}


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("name", RINGS)
def test_rings_of_four_devices(name, order, kernel):
    """Forward and backward are those of one device, whether shards are left out while tracing or skipped by kernels."""
    require_devices(4)
    make, ids = RINGS[name], jnp.asarray(np.arange(S)[None] // 10, jnp.int32)

    def permuted(x, axis=1):
        return zigzag_permute(x, devices=4, axis=axis) if order == "zigzag" else x

    def local(q, k, v, ids):
        return ring_attention(q, k, v, axis_name="x", order=order, mask=make(ids), implementation=kernel)

    shard = P(None, "x")
    mesh = Mesh(np.asarray(jax.devices()[:4]), ("x",))
    ring = jax.shard_map(local, mesh=mesh, in_specs=(shard,) * 4, out_specs=shard)

    def through(q, k, v):
        out = ring(*map(permuted, (q, k, v)), permuted(ids))
        return zigzag_unpermute(out, devices=4) if order == "zigzag" else out

    whole = partial(flash_attention, mask=make(ids), implementation="xla")
    for got, wanted in zip(*(jax.jit(partial(with_gradients, f))(*X) for f in (through, whole)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def with_gradients(run, *arrays):
    out, pullback = jax.vjp(run, *arrays)
    return out, *pullback(jnp.cos(out))


TILE = 64  # rows and keys of the smallest tile for which kernels store anything


def memory(mask, tokens, implementation, **options):
    """Bytes of temporaries of a forward, and of both passes, and those of the mask's own arrays."""
    x = jax.ShapeDtypeStruct((1, tokens, 1, D), jnp.float32)

    def forward(q, mask):
        return flash_attention(q, q, q, mask=mask, implementation=implementation, **options)

    def both(q, mask):
        return jax.grad(lambda q: forward(q, mask).sum())(q)

    found = (jax.jit(f).lower(x, mask).compile().memory_analysis() for f in (forward, both))
    return [analysis.temp_size_in_bytes for analysis in found]


@pytest.mark.parametrize("count", [1, 2])
def test_a_mask_takes_eight_bytes_a_range_and_row(count, kernel):
    """Ranges take their limits and at most 72 bytes a tile more than a causal call, which has the same tiles."""
    tokens = 8192
    mask = (
        masks.prefix_lm(jnp.int32(9)) if count == 1 else masks.first_and_window(jnp.int32(4), jnp.int32(90))
    )
    tiles = tokens // TILE
    for own, causal in zip(
        memory(mask, tokens, kernel), memory(None, tokens, kernel, causal=True), strict=True
    ):
        assert own - causal <= 8 * count * tokens + 72 * tiles + 4096


def test_arrays_have_no_kernel_beside_a_draft_mask():
    mask = masks.dense(np.ones((1, 1, 4, 48), bool))
    (x, k, v), tables = (x[0] for x in X), jnp.array([[0, 1, 2]])
    pages = [y.reshape(3, 16, 2, D) for y in (k, v)]
    with pytest.raises(NotImplementedError, match=r"masks\.dense.*no implementation has beside draft_mask"):
        paged_attention(
            x[None, :4], *pages, tables, jnp.array([S]), mask=mask, draft_mask=np.ones((1, 4, 4), bool)
        )


def test_arrays_beside_pages_hide_keys_past_their_own(implementation):
    """An array of fewer keys than the pages hold, of one row, of one key, and of no key."""
    x, lengths, tables = X[0][0], jnp.array([S]), jnp.array([[0, 1, 2]])
    pages = [y[0].reshape(3, 16, 2, D) for y in X[1:]]
    run = partial(paged_attention, x[None], *pages, tables, lengths, implementation=implementation)
    for mask, same in (
        (masks.dense(np.ones((1, 1, S, 20), bool)), masks.ranges(0, 20)),
        (masks.dense((np.arange(30) < 9)[None, None, None]), masks.ranges(0, 9)),
        (
            masks.dense((np.arange(S)[:, None] < 9)[None, None]),
            masks.ranges(0, np.where(np.arange(S) < 9, S, 0)),
        ),
        (masks.dense(np.ones((1, 1, S, 0), bool)), masks.ranges(0, 0)),
        (masks.dense(np.ones((1, 1, 1, 0), bool)), masks.ranges(0, 0)),
    ):
        np.testing.assert_allclose(run(mask=mask), run(mask=same), rtol=1e-5, atol=1e-5)


def test_packed_and_paged_calls_take_functions_and_ranges_of_one_batch_entry():
    x, offsets = jnp.ones((7, 1, 8)), np.array([0, 3, 7], np.int32)
    packed = partial(flops, flash_attention_varlen, x, x, x, offsets)
    pages = (jnp.ones((2, 4, 1, 8)),) * 2
    paged = partial(flops, paged_attention, x, *pages, [[0], [1]], np.diff(offsets), cu_seqlens_q=offsets)
    of_tokens = masks.ranges(0, np.array([1, 2, 3, 1, 2, 3, 4])[None, None])
    for mask in (masks.from_function(lambda b, h, i, j: j <= i, 4, 4), of_tokens):
        assert packed(mask=mask) == packed(causal=True) == paged(mask=mask)
    of_no_rows = masks.from_function(lambda b, h, i, j: j <= i, 0, 4)
    assert packed(mask=of_no_rows) == 0


def test_arrays_of_any_rank_without_rank_promotion(implementation):
    """With jax_numpy_rank_promotion="raise" JAX refuses operands of different ranks."""
    q, starts, zeros = (
        jnp.ones((8, 2, 8)),
        jnp.array([0, 3, 8], jnp.int32),
        jnp.zeros((2, 1, 1, 1), jnp.int32),
    )
    pages = (
        *[jnp.ones((4, 8, 2, 8))] * 2,
        jnp.array([[0, 1], [2, 9]], jnp.int32),
        jnp.array([8, 16], jnp.int32),
    )
    segments = masks.segments(starts[:2, None] * jnp.ones((1, 4), jnp.int32), jnp.zeros((2, 16), jnp.int32))
    run = partial(paged_attention, implementation=implementation)
    with jax.numpy_rank_promotion("raise"):
        whole, ranges = [q[None]] * 3, masks.ranges(jnp.full(8, 3, jnp.int32), 8)
        out = flash_attention(*whole, mask=ranges, implementation=implementation)
        np.testing.assert_allclose(out, 1, rtol=1e-6)
        _, largest = flash_attention_varlen(q, q, q, starts, return_max=True, implementation=implementation)
        np.testing.assert_allclose(largest, 8**0.5, rtol=1e-6)
        missing = run(q.reshape(2, 4, 2, 8), *pages, mask=masks.blocks(zeros, (16, 16)))
        np.testing.assert_allclose(missing[:, 0, 0, 0], [1, jnp.nan], rtol=1e-6)
        out = run(q.reshape(2, 4, 2, 8), *pages, mask=segments)
        np.testing.assert_allclose(out[0, 0], 1, rtol=1e-6)


def test_arrays_beside_packed_keys_are_no_work_for_the_compiler(kernel):
    """XLA evaluates what depends only on constants while it compiles, which took half a minute for 4 million pairs."""
    mask = masks.dense(np.tril(np.ones((8, 8), bool))[None, None])
    x, starts = jnp.ones((8, 2, 8)), jnp.array([0, 8], jnp.int32)
    text = (
        jax.jit(lambda x: flash_attention_varlen(x, x, x, starts, mask=mask, implementation=kernel))
        .lower(x)
        .as_text()
    )
    barrier = text.index("optimization_barrier")
    assert "tensor<1x1x8x8xi1>" in text[barrier : text.index("\n", barrier)]


def test_masks_of_different_kinds_differ_in_structure():
    """Else lax.cond would return the first branch's kind of mask for both."""
    x = jnp.array([[1, 1, 2, 2]], jnp.int32)
    kinds = [
        (masks.chunked(3), masks.block_diffusion(3)),
        (masks.prefix_lm(x[0]), masks.bidirectional_spans(x)),
        (masks.segments(x), masks.first_and_window(x[0], x[0])),
    ]
    for first, second in kinds:
        assert first != second
        assert first == jax.tree.unflatten(jax.tree.structure(first), jax.tree.leaves(first))
        assert jax.tree.structure(first) != jax.tree.structure(second)
    first, second = kinds[0]
    with pytest.raises(TypeError, match="pytree structure"):
        jax.lax.cond(True, lambda: first, lambda: second)


def test_a_mask_of_numbers_makes_no_array():
    """So a module may have one as a constant before jax.distributed.initialize()."""
    with jax.transfer_guard_host_to_device("disallow_explicit"):
        _ = masks.ranges(0, 2) | masks.ranges(3, 5)
        _ = masks.chunked(3) & masks.causal(1) & masks.window(2, 3)
        _ = masks.prefix_lm(2), masks.first_and_window(1, 2), masks.block_diffusion(2)
