"""flops: two for each product along the head dim of each visible pair, which the oracle counts one at a time."""

import functools
import re

import equations
import jax
import jax.numpy as jnp
import numpy as np
import pages
import pytest
from cases import ARRAYS, FIXED, VARLEN, Case, make_inputs, operands, spec, varlen

from jax_flash import (
    append_kv,
    dot_product_attention,
    flash_attention,
    flash_attention_varlen,
    flops,
    masks,
    paged_attention,
    ring_attention,
)

by_name = pytest.mark.parametrize("case", FIXED + VARLEN + ARRAYS, ids=lambda case: case.name)


def count(case, inputs, of="forward", **options):
    function = flash_attention if case.layout == "fixed" else flash_attention_varlen
    return flops(function, *inputs.positional.values(), **inputs.keywords, **case.options, of=of, **options)


def shape_of(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def forward(case, pairs):
    return 2 * (case.d + case.dv) * pairs


@by_name
def test_pairs_are_those_that_the_oracle_sees(case):
    inputs = make_inputs(case)
    assert count(case, inputs) == forward(case, equations.visible_pairs(spec(case, inputs), operands(inputs)))


@by_name
def test_shapes_alone_are_enough_where_no_value_hides_anything(case):
    inputs = make_inputs(case)
    floats = {
        name: shape_of(x) for name, x in inputs.positional.items() if x is not None and x.dtype.kind != "i"
    }
    inputs.positional.update(floats)
    others = {n: shape_of(x) for n, x in inputs.keywords.items() if n not in ("segment_ids", "mask", "bias")}
    others = {n: x for n, x in others.items() if not n.endswith("lengths")}
    wanted = count(case, inputs)
    inputs.keywords.update(others)
    assert count(case, inputs) == wanted


def test_a_pass_has_its_products():
    case = Case("", b=2, sq=8, sk=8, hq=3, hk=1, d=24, dv=8)
    inputs, pairs = make_inputs(case), 2 * 3 * 8 * 8
    assert count(case, inputs) == 2 * (24 + 8) * pairs
    assert count(case, inputs, "backward") == 2 * (3 * 24 + 2 * 8) * pairs
    assert count(case, inputs, "tangent") == 2 * (3 * 24 + 2 * 8) * pairs


def test_the_number_is_exact_where_floats_and_int64_are_not():
    x = jax.ShapeDtypeStruct((16384, 1 << 20, 128, 255), jnp.bfloat16)
    number = flops(flash_attention, x, x, x, causal=True)
    assert isinstance(number, int)
    assert number == 2 * (255 + 255) * 16384 * 128 * ((1 << 20) * ((1 << 20) + 1) // 2)
    assert number > 2**63


@pytest.mark.parametrize("seed", range(6))
def test_segments_in_any_order(seed):
    rng = np.random.default_rng(seed)
    case = Case(
        "",
        b=3,
        sq=11,
        sk=14,
        causal=seed % 2 == 0,
        window=(4, 5) if seed % 3 else None,
        align="top_left" if seed % 2 else "bottom_right",
        segments=3,
        q_lengths=(11, 4, 0),
        kv_lengths=(9, 14, 0),
    )
    inputs = make_inputs(case)
    ids = tuple(jnp.asarray(rng.integers(-2, 3, size), jnp.int32) for size in ((3, 11), (3, 14)))
    inputs.keywords["segment_ids"] = ids
    pairs = equations.visible_pairs(spec(case, inputs), operands(inputs))
    assert count(case, inputs) == forward(case, pairs)
    inputs.keywords["segment_ids"] = tuple(x.tolist() for x in ids)
    assert count(case, inputs) == forward(case, pairs)


@pytest.mark.parametrize("paged", [False, True], ids=["packed", "pages"])
def test_offsets_out_of_order_are_their_running_maximum_within_the_tokens(paged):
    """They are read as the call reads them: [-4, 5, 3, 8, 2, 99] of 10 tokens is [0, 5, 5, 8, 8, 10]."""
    x, pool, tables = jnp.zeros((10, 4, 8)), jnp.zeros((9, 4, 2, 8)), np.zeros((5, 3), int)
    wild, tame = np.array([[-4, 5, 3, 8, 2, 99], [0, 5, 5, 8, 8, 10]], np.int32)

    def count(offsets, **options):
        if paged:
            lengths = np.array([12, 3, 9, 5, 2], np.int32)
            options |= {"cu_seqlens_q": offsets}
            return flops(paged_attention, x, pool, pool, tables, lengths, causal=True, **options)
        return flops(flash_attention_varlen, x, x, x, offsets, causal=True, **options)

    assert count(wild) == count(tame)
    pairs = (15, 6, 3) if not paged else (12 * 5 - 10, 9 * 3 - 3, 2 + 1)
    assert count(wild) == 2 * (8 + 8) * 4 * sum(pairs)
    if not paged:
        keys = np.array([0, 99, 3, 3, 7, -1], np.int32)  # [0, 10, 10, 10, 10, 10]
        got = flops(flash_attention_varlen, x, x, x, tame, keys)
        assert got == flops(
            flash_attention_varlen, x, x, x, tame, np.array([0, 10, 10, 10, 10, 10], np.int32)
        )


def test_a_bias_of_minus_infinity_hides_its_pairs():
    case = Case("", bias=(4, 12, 12), mask=(2, 1, 1, 12), causal=True)
    inputs = make_inputs(case)
    hidden = np.random.default_rng(1).random((4, 12, 12)) < 0.4
    inputs.keywords["bias"] = jnp.where(hidden, -jnp.inf, inputs.keywords["bias"])
    assert count(case, inputs) == forward(case, equations.visible_pairs(spec(case, inputs), operands(inputs)))


PAGED = [
    Case("decode", b=4, sq=1, sk=30, kv_lengths=(13, 0, 1, 30)),
    Case("chunk", b=3, sq=4, sk=30, kv_lengths=(25, 4, 2), causal=True),
    varlen("mixed", (1, 7, 0, 12, 1), k_sequences=(20, 7, 5, 9, 1), padding=(3, 0), window=(3, 2)),
    Case("tree", b=3, sq=4, sk=30, kv_lengths=(25, 4, 2), window=(5, 1), draft_mask=(3, 4, 4)),
    varlen("trees", (1, 7, 0, 12, 1), k_sequences=(20, 7, 5, 9, 1), causal=True, draft_mask=(1, 8, 8)),
]


@pytest.mark.parametrize("layout", ["nhd", "hnd"])
@pytest.mark.parametrize("case", PAGED, ids=lambda case: case.name)
def test_keys_in_pages_count_as_the_same_keys_elsewhere(case, layout):
    call = pages.paged(case, layout=layout)
    arrays = dict(call.arrays)
    positional = [arrays.pop(name) for name in ("query", "key", "value", "block_tables", "kv_lengths")]
    options = {name: value for name, value in case.options.items() if name != "dropout_rate"}
    got = flops(paged_attention, *positional, **arrays, **options, page_layout=layout)
    dense = operands(call.inputs)
    assert got == forward(case, equations.visible_pairs(spec(case, call.inputs), dense))


@pytest.mark.parametrize("shape", [(2, 12, 4, 16), (12, 4, 16)])
def test_jax_nns_call_counts_as_the_same_call(shape):
    x, mask = jnp.zeros(shape), np.tri(12, 12, 3, bool)
    lengths = [12, 5] if len(shape) == 4 else [7]
    got = flops(
        dot_product_attention,
        *(x, x, x),
        mask=mask,
        is_causal=True,
        local_window_size=4,
        query_seq_lengths=lengths,
        key_value_seq_lengths=np.array(lengths),
    )
    batched = x.reshape(-1, 12, 4, 16)
    options = dict(mask=mask, causal=True, window=(4, 4), align="top_left")
    lengths_of = dict(q_lengths=lengths, kv_lengths=lengths)
    assert got == flops(flash_attention, batched, batched, batched, **options, **lengths_of)


# Counts from shapes alone.

Q, PACKED = jnp.zeros((2, 6, 4, 8)), jnp.zeros((7, 4, 8))
INDEX = jax.ShapeDtypeStruct((2,), jnp.int32)


def test_unknown_lengths_are_full_and_unknown_masks_hide_nothing():
    everything = flops(flash_attention, Q, Q, Q)
    unknown = dict(
        kv_lengths=INDEX,
        q_lengths=INDEX,
        mask=jax.ShapeDtypeStruct((6, 6), bool),
        bias=jax.ShapeDtypeStruct((6, 6), jnp.float32),
        segment_ids=jax.ShapeDtypeStruct((2, 6), jnp.int32),
    )
    assert flops(flash_attention, Q, Q, Q, **unknown) == everything
    assert jax.jit(lambda x: flops(flash_attention, Q, Q, Q, **x))(
        {n: jnp.zeros(x.shape, x.dtype) for n, x in unknown.items()}
    ) == jnp.int32(everything)


def test_unknown_offsets_divide_the_tokens_evenly():
    offsets = jax.ShapeDtypeStruct((4,), jnp.int32)
    got = flops(flash_attention_varlen, PACKED, PACKED, PACKED, offsets, causal=True)
    assert got == flops(flash_attention_varlen, PACKED, PACKED, PACKED, [0, 3, 5, 7], causal=True)


def test_unknown_lengths_of_pages_are_the_capacity_of_the_table():
    pool, tables = jnp.zeros((9, 4, 2, 8)), np.zeros((2, 3), int)
    got = flops(paged_attention, Q, pool, pool, tables, INDEX, causal=True)
    assert got == flops(paged_attention, Q, pool, pool, tables, 12, causal=True)


# jax.experimental.roofline.


def estimate(function, *arrays):
    return pytest.importorskip("jax.experimental.roofline").roofline(function)(*arrays)[1]


def test_jax_roofline_counts_each_pass_as_flops_does():
    q, k = jnp.zeros((2, 12, 4, 16), jnp.bfloat16), jnp.zeros((2, 20, 2, 16), jnp.bfloat16)
    attend = functools.partial(flash_attention, causal=True, window=(5, 0))
    found = estimate(attend, q, k, k)
    assert found.flops == found.unfused_flops == flops(flash_attention, q, k, k, **attend.keywords)
    assert found.hbm_bytes == 2 * (2 * q.size + 2 * k.size) + 4 * 2 * 12 * 4  # with lse in float32
    gradient = jax.jit(jax.grad(lambda *x: attend(*x).sum().astype(jnp.float32), (0, 1, 2)))
    work = [flops(flash_attention, q, k, k, **attend.keywords, of=of) for of in ("forward", "backward")]
    assert estimate(gradient, q, k, k).flops == sum(work)
    forward_mode = estimate(lambda *x: jax.jvp(attend, x, x), q, k, k)
    assert forward_mode.flops == work[0] + flops(flash_attention, q, k, k, **attend.keywords, of="tangent")
    mapped = jax.vmap(jax.vmap(attend, (0, None, None)), (None, 0, 0))
    found = estimate(mapped, jnp.stack([q] * 3), *[jnp.stack([k] * 2)] * 2)
    assert found.flops == 6 * work[0]


def test_jax_roofline_counts_packed_sequences_pages_and_scans():
    offsets, pool, tables = jnp.array([0, 3, 7]), jnp.zeros((9, 4, 2, 8)), jnp.zeros((2, 3), jnp.int32)
    evenly = flops(flash_attention_varlen, PACKED, PACKED, PACKED, [0, 4, 7], causal=True)
    packed = functools.partial(flash_attention_varlen, causal=True)
    assert estimate(packed, PACKED, PACKED, PACKED, offsets).flops == evenly
    full = flops(paged_attention, Q, pool, pool, tables, 12)
    assert estimate(paged_attention, Q, pool, pool, tables, offsets[1:]).flops == full
    found = estimate(append_kv, pool, pool, *[Q[:, :, :2]] * 2, tables, offsets[1:])
    assert (found.flops, found.hbm_bytes >= 4 * 4 * Q[:, :, :2].size) == (0, True)
    assert found.hbm_bytes < pool.nbytes * 2

    def layers(x):
        return jax.lax.scan(lambda x, _: (flash_attention(x, x, x), None), x, length=5)[0]

    assert estimate(layers, Q).flops == flops(flash_attention, Q, Q, Q)  # JAX counts a scan's body once


def test_a_ring_counts_as_the_whole_sequence_on_all_devices():
    ids = np.sort(np.random.default_rng(0).integers(0, 3, Q.shape[:2]))
    options = dict(causal=True, window=(5, None), segment_ids=ids, kv_lengths=[9, 12])
    ring = dict(axis_name="sequence", order="zigzag", mode="all_to_all")
    for of in ("forward", "backward", "tangent"):
        wanted = flops(flash_attention, Q, Q, Q, of=of, **options)
        assert flops(ring_attention, Q, Q, Q, of=of, **options, **ring) == wanted
    mesh = jax.make_mesh((1,), ("sequence",), (jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec(None, "sequence")
    inside = jax.shard_map(
        lambda x: x + flops(ring_attention, x, x, x, axis_name="sequence"),
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
    )
    with pytest.raises(
        ValueError, match=r"ring_attention: its whole sequence is not known inside jax.shard_map"
    ):
        inside(Q)


# Errors.


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: flops(jax.nn.dot_product_attention, Q, Q, Q),
            TypeError,
            "flash_attention, flash_attention_varlen, paged_attention, dot_product_attention, ring_attention",
        ),
        (lambda: flops(jnp.ones(2), Q, Q), TypeError, "flops: function is ArrayImpl; allowed"),
        (
            lambda: flops(jax.jit(flash_attention), Q, Q, Q),
            TypeError,
            "flops: function is a wrapper of flash_attention; allowed are flash_attention, ",
        ),
        (
            lambda: flops(ring_attention, Q, Q, Q, axis_name="x", order="striped"),
            ValueError,
            "ring_attention: order must be one of ('contiguous', 'zigzag'), got 'striped'",
        ),
        (
            lambda: flops(flash_attention, Q, Q, Q, of="both"),
            ValueError,
            "flops: of is 'both'; allowed are \"forward\", \"backward\" and \"tangent\"",
        ),
        (lambda: flops(flash_attention, Q, Q), TypeError, "flash_attention: missing a required argument: 'value'"),
        (lambda: flops(flash_attention, *[Q] * 4), TypeError, "flash_attention: too many positional arguments"),
        (
            lambda: flops(flash_attention, Q, Q[:, :, :3], Q[:, :, :3]),
            ValueError,
            "flash_attention: key has 3 heads, which does not divide query's 4",
        ),
        (
            lambda: flops(flash_attention, Q, Q, Q, kv_lengths=[1.0, 2.0]),
            TypeError,
            "flash_attention: kv_lengths must hold integers, got float64",
        ),
    ],
)  # fmt: skip
def test_wrong_calls_raise_as_the_call_does(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_lengths_on_the_host_beside_a_mask_in_64_bit_mode():
    x = np.zeros((1, 8, 2, 8), np.float32)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        counted = flops(flash_attention, x, x, x, mask=masks.chunked(4), kv_lengths=[5])
    assert counted == flops(
        flash_attention, x, x, x, mask=masks.chunked(4), kv_lengths=jnp.array([5], jnp.int32)
    )


def test_lengths_of_which_only_the_shape_is_known_are_full_beside_a_mask():
    like = jax.ShapeDtypeStruct
    pool, tables = like((6, 4, 2, 8), np.float32), like((2, 3), np.int32)
    call = (paged_attention, like((2, 4, 2, 8), np.float32), pool, pool, tables)
    for mask in (masks.chunked(2), masks.chunked(2) & masks.causal()):
        full = flops(*call, np.array([12, 12], np.int32), mask=mask)
        assert flops(*call, like((2,), np.int32), mask=mask) == full < flops(*call, 12)


def test_a_mask_is_counted_where_no_transfer_is_allowed():
    x, lo = np.zeros((2, 19, 2, 8), np.float32), jnp.arange(19)
    call = functools.partial(flops, flash_attention, x, x, x)
    mask = masks.ranges(lo, lo + 3) | masks.ranges(14, 17)
    counted = call(mask=mask)
    with jax.transfer_guard("disallow_explicit"):
        assert call(mask=mask) == counted
