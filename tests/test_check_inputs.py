"""check_inputs raises on the host for index arrays whose values a call would have to clamp or ignore."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash import masks
from jax_flash.check import check_inputs


def i32(*values):
    return jnp.array(values, jnp.int32)


def zeros(*shape):
    return jnp.zeros(shape, jnp.bfloat16)


def scales_of_pages(known):
    """Scales [6, 2] with NaN on the other pages."""
    return np.float32([[known.get(page, np.nan)] * 2 for page in range(6)])


FIXED = {"query": zeros(2, 8, 4, 16), "key": zeros(2, 12, 2, 16), "value": zeros(2, 12, 2, 16)}
PACKED = {"query": zeros(30, 4, 16), "key": zeros(40, 2, 16), "value": zeros(40, 2, 16)}
POOL = {"k_pages": zeros(6, 4, 2, 16), "v_pages": zeros(6, 4, 2, 16)}

VALID = {
    "nothing": {},
    "fixed lengths, empty and full": dict(FIXED, q_lengths=i32(0, 8), kv_lengths=i32(12, 0)),
    "jax.nn's names": dict(FIXED, query_seq_lengths=i32(0, 8), key_value_seq_lengths=i32(12, 0)),
    "one entry without batch": {"query": zeros(8, 4, 16), "query_seq_lengths": i32(8)},
    "absent arguments": dict(FIXED, q_lengths=None, segment_ids=None, mask=None, bias=None),
    "a mask": dict(FIXED, mask=masks.ranges([[0]], [[12]]) & masks.blocks([[[[0, -1, -1]]]], (16, 16))),
    "positions of keys in use": dict(
        FIXED,
        kv_lengths=i32(2, 3),
        mask=masks.by_position(i32([0] * 8), i32([1, 1, 0, *[0] * 9], [0, 2, 4, *[1] * 9])),
    ),
    "positions of keys that all entries share": dict(
        FIXED, kv_lengths=i32(2, 3), mask=masks.by_position(i32(*[0] * 8), i32(1, 1, 2, 0, *[9] * 8))
    ),
    "segments of pages that all sequences share": dict(
        POOL,
        block_tables=i32([0, 1], [2, 3]),
        kv_lengths=i32(3, 3),
        mask=masks.segments([[0], [0]], [[0, 0, 1, 5, 0, 0, 0, 0]]),
    ),
    "packed ranges, shared and of each token": dict(
        PACKED,
        cu_seqlens_q=i32(0, 3, 30),
        mask=masks.ranges(0, 27) & masks.ranges(0, i32(3, 3, 3, *[27] * 27)),
    ),
    "a function of the rows of packed sequences": dict(
        PACKED, cu_seqlens_q=i32(0, 3, 30), mask=masks.from_function(lambda b, h, i, j: j < 27, 30, 27)
    ),
    "packed segments": dict(
        PACKED,
        cu_seqlens_q=i32(0, 5, 30),
        cu_seqlens_k=i32(0, 5, 40),
        mask=masks.segments(i32(*[0] * 30), i32(*[5] * 5, *[2] * 35)),
    ),
    "segments, any value": dict(
        FIXED, segment_ids=(jnp.full((2, 8), -7, jnp.int32), jnp.full((2, 12), 2**31 - 1, jnp.int32))
    ),
    "one segment array": {
        "query": zeros(2, 8, 4, 16),
        "key": zeros(2, 8, 2, 16),
        "segment_ids": jnp.zeros((2, 8), jnp.int32),
    },
    "packed, empty sequences and padding": dict(
        PACKED, cu_seqlens_q=i32(0, 0, 20, 30), cu_seqlens_k=i32(0, 10, 10, 39), kv_lengths=i32(10, 0, 5)
    ),
    "packed, no sequences": dict(PACKED, cu_seqlens_q=i32(0)),
    "one length for all": dict(FIXED, q_lengths=8, kv_lengths=np.int64(12)),
    "one length for all, paged": dict(POOL, block_tables=i32([0, 1], [2, 3]), kv_lengths=8),
    "plain lists": dict(PACKED, cu_seqlens_q=[0, 5, 30]),
    "paged, garbage past the length": dict(
        POOL, query=zeros(2, 1, 4, 16), block_tables=i32([5, -1, 99], [0, 5, 1]), kv_lengths=i32(4, 12)
    ),
    "paged, no page in use": dict(POOL, block_tables=i32([-1, -1]), kv_lengths=i32(0)),
    "paged, sharing pages": dict(POOL, block_tables=i32([3, 1], [3, 2]), kv_lengths=i32(8, 8)),
    "append to own pages": dict(
        POOL,
        key=zeros(2, 3, 2, 16),
        value=zeros(2, 3, 2, 16),
        block_tables=i32([3, 1], [3, 2]),
        kv_lengths=i32(4, 5),
    ),
    "append packed": dict(
        POOL,
        key=zeros(9, 2, 16),
        cu_seqlens=i32(0, 2, 2, 9),
        block_tables=i32([3, 1], [0, 0], [4, 5]),
        kv_lengths=i32(6, 0, 1),
        rotary=(jnp.zeros((8, 8)), jnp.zeros((8, 8))),
    ),
    "a scale of all heads": dict(POOL, k_scale=0.5, v_scale=np.float32(2)),
    "scales of heads and of pages": dict(POOL, k_scale=np.ones(2, np.float32), v_scale=jnp.ones((6, 2))),
    "scales, garbage on pages that hold no keys": dict(
        POOL, block_tables=i32([5, 0], [1, 9]), kv_lengths=i32(4, 3), k_scale=scales_of_pages({5: 2, 1: 3})
    ),
    "scales of one layer's shapes": dict(k_scale=jax.ShapeDtypeStruct((2,), jnp.float32), **POOL),
    "positions": {"x": zeros(2, 3, 4, 16), "positions": i32([0, 1, 2], [7, 6, 5]), "cos": jnp.zeros((8, 8))},
}


@pytest.mark.parametrize("name", VALID)
def test_valid_arrays_pass(name):
    assert check_inputs(**VALID[name]) is None


WRONG = {
    "decreasing": (
        dict(PACKED, cu_seqlens_q=i32(0, 5, 20, 17)),
        "cu_seqlens_q[3] = 17 is less than cu_seqlens_q[2] = 20; offsets must not decrease",
    ),
    "first offset": ({"cu_seqlens_k": i32(2, 5)}, "cu_seqlens_k[0] = 2; the first offset must be 0"),
    "negative first offset": (
        {"cu_seqlens_q": i32(-1, 5)},
        "cu_seqlens_q[0] = -1; the first offset must be 0",
    ),
    "no offset": ({"cu_seqlens_q": i32()}, "cu_seqlens_q is empty; n sequences have n + 1 offsets"),
    "past query": (
        dict(PACKED, cu_seqlens_q=i32(0, 31)),
        "cu_seqlens_q[1] = 31 is more than query's 30 tokens",
    ),
    "past key": (
        dict(PACKED, cu_seqlens_q=i32(0, 5, 6), cu_seqlens_k=i32(0, 41, 41)),
        "cu_seqlens_k[1] = 41 is more than key's 40 tokens",
    ),
    "different counts": (
        {"cu_seqlens_q": i32(0, 5, 6), "cu_seqlens_k": i32(0, 5)},
        "cu_seqlens_k has 1 sequences, but cu_seqlens_q has 2",
    ),
    "lengths of another batch": (
        dict(FIXED, q_lengths=i32(1, 1, 1)),
        "query has 2 sequences, but q_lengths has 3",
    ),
    "negative length": (dict(FIXED, q_lengths=i32(3, -4)), "q_lengths[1] = -4; a length must be at least 0"),
    "q_lengths": (dict(FIXED, q_lengths=i32(3, 9)), "q_lengths[1] = 9 is more than query's length 8"),
    "kv_lengths": (dict(FIXED, kv_lengths=i32(13, 9)), "kv_lengths[0] = 13 is more than key's length 12"),
    "one length for all": (dict(FIXED, kv_lengths=13), "kv_lengths[0] = 13 is more than key's length 12"),
    "one length for all, paged": (
        dict(POOL, block_tables=i32([0, 1], [2, 3]), kv_lengths=9),
        "kv_lengths[0] = 9 is more than the capacity of its row of block_tables, 8",
    ),
    "no int32": ({"kv_lengths": [1, 2**31]}, "kv_lengths holds 2147483648, allowed are the values of int32"),
    "jax.nn's": (
        dict(FIXED, key_value_seq_lengths=i32(0, 13)),
        "key_value_seq_lengths[1] = 13 is more than key's length 12",
    ),
    "keys of a sequence": (
        dict(PACKED, cu_seqlens_q=i32(0, 3, 9), kv_lengths=i32(3, 7)),
        "kv_lengths[1] = 7 is more than the keys of its sequence, 6",
    ),
    "a range past the keys": (
        dict(FIXED, mask=masks.ranges([0, 4], [12, 13])),
        "mask's hi[1] = 13; a range lies within 0 and the 12 keys",
    ),
    "a range past the keys of every sequence": (
        dict(PACKED, cu_seqlens_q=i32(0, 10, 30), mask=masks.ranges(0, 21)),
        "mask's hi = 21; a range lies within 0 and the 20 keys",
    ),
    "a range past the keys of the token's sequence": (
        dict(PACKED, cu_seqlens_q=i32(0, 10, 30), mask=masks.ranges(0, i32(*[11] * 30))),
        "mask's hi of row 0[0] = 11; a range lies within 0 and the 10 keys",
    ),
    "a block past the keys of every sequence": (
        dict(PACKED, cu_seqlens_q=i32(0, 12, 30), mask=masks.blocks([[[[1], [2]]]], (16, 16))),
        "mask's chosen[0, 0, 1, 0] = 2; 18 keys have 2 blocks of 16",
    ),
    "positions of shared keys that fall": (
        dict(FIXED, kv_lengths=i32(2, 4), mask=masks.by_position(i32(*[0] * 8), i32(1, 1, 2, 0, *[9] * 8))),
        "mask's kv_positions[3] = 0; the positions of keys must not decrease",
    ),
    "a range that ends before it begins": (
        dict(FIXED, mask=masks.causal() & masks.ranges([3, 4], [3, 2])),
        "mask's lo[1] = 4; a range begins at or before its end",
    ),
    "a block past the keys": (
        dict(FIXED, mask=masks.blocks([[[[0, 1]]]], (16, 16))),
        "mask's chosen[0, 0, 0, 1] = 1; 12 keys have 1 blocks of 16",
    ),
    "a block twice": (
        {"mask": masks.blocks([[[[3, -1, 0, -1, 3]]]], (16, 16))},
        "mask's chosen[0, 0, 0, 4] = 3; a block of keys is chosen once for a block of rows",
    ),
    "positions that fall": (
        dict(
            PACKED,
            cu_seqlens_q=i32(0, 5, 9),
            mask=masks.by_position(i32(*[0] * 9), i32(0, 1, 2, 3, 4, 0, 2, 1, 5)),
        ),
        "mask's kv_positions of row 1[2] = 1; the positions of keys must not decrease",
    ),
    "segments apart": (
        dict(PACKED, cu_seqlens_q=i32(0, 4), mask=masks.segments(i32(0, 1, 0, 1))),
        "mask's segments of keys[2] = 0; in packed and paged calls the keys of a segment are neighbours",
    ),
    "rank": ({"cu_seqlens_q": i32([0, 3])}, "cu_seqlens_q must have rank 1, got shape (1, 2)"),
    "segments": (
        dict(FIXED, segment_ids=jnp.zeros((2, 8), jnp.int32)),
        "segment_ids has shape (2, 8) for key, whose batch and length are (2, 12)",
    ),
    "page past the pool": (
        dict(POOL, block_tables=i32([0, 1, 2], [3, 6, 0]), kv_lengths=i32(12, 5)),
        "block_tables[1, 1] = 6 is outside the pool of 6 pages, and sequence 1 with 5 keys needs it",
    ),
    "segments in lists": (
        dict(FIXED, segment_ids=[[0] * 8] * 2),
        "segment_ids must be one array or a pair (q_ids, kv_ids), got 2 lists of numbers; numpy.array makes one array "
        "of rows",
    ),
    "negative page": (
        dict(POOL, block_tables=i32([-2]), kv_lengths=i32(1)),
        "block_tables[0, 0] = -2 is outside the pool of 6 pages, and sequence 0 with 1 keys needs it",
    ),
    "cache too long": (
        dict(POOL, block_tables=i32([0, 1]), kv_lengths=i32(9)),
        "kv_lengths[0] = 9 is more than the capacity of its row of block_tables, 8",
    ),
    "no room to append": (
        dict(POOL, key=zeros(1, 3, 2, 16), block_tables=i32([0, 1]), kv_lengths=i32(6)),
        "kv_lengths[0] = 6 and 3 keys to append are more than the capacity of its row of block_tables, 8",
    ),
    "page to append to": (
        dict(POOL, key=zeros(1, 1, 2, 16), block_tables=i32([0, 7]), kv_lengths=i32(4)),
        "block_tables[0, 1] = 7 is outside the pool of 6 pages, and sequence 0 with 5 keys needs it",
    ),
    "two writers of a slot": (
        dict(POOL, key=zeros(2, 1, 2, 16), block_tables=i32([0], [0]), kv_lengths=i32(2, 2)),
        "block_tables rows 0 and 1 both append to page 0, slot 2",
    ),
    "rotary table": (
        dict(
            POOL,
            key=zeros(1, 1, 2, 16),
            block_tables=i32([0, 1]),
            kv_lengths=i32(5),
            rotary=(jnp.zeros((5, 8)), jnp.zeros((5, 8))),
        ),
        "kv_lengths[0] = 5 and 1 keys to append are more than the positions of rotary, 5",
    ),
    "positions": (
        {"positions": i32([0, 8]), "cos": jnp.zeros((8, 8))},
        "positions[0, 1] = 8 is outside the 8 rows of cos; allowed are 0 to 7",
    ),
    "scale of other heads": (
        dict(POOL, k_scale=jnp.ones(3)),
        "k_scale must be a number or have shape [hk] = (2,) or [p, hk] = (6, 2), got (3,)",
    ),
    "scale of other pages": (
        dict(POOL, v_scale=jnp.ones((5, 2))),
        "v_scale must be a number or have shape [hk] = (2,) or [p, hk] = (6, 2), got (5, 2)",
    ),
    "scale of pages in the other layout": (
        dict(POOL, page_layout="hnd", k_scale=jnp.ones(2)),
        "k_scale must be a number or have shape [hk] = (4,) or [p, hk] = (6, 4), got (2,)",
    ),
    "a scale of 0": (
        dict(POOL, k_scale=np.float32([1, 0])),
        "k_scale[1] = 0.0; a scale must be finite and more",
    ),
    "a scale of all heads": (
        dict(POOL, k_scale=-1.0),
        "k_scale = -1.0; a scale must be finite and more",
    ),
    "a negative scale": (
        dict(k_scale=np.float32([-1, 1])),
        "k_scale[0] = -1.0; a scale must be finite and more",
    ),
    "a scale that is NaN on a page in use": (
        dict(POOL, block_tables=i32([5, 0]), kv_lengths=i32(5), k_scale=scales_of_pages({5: 2})),
        "k_scale[0, 0] = nan; a scale must be finite and more than 0",
    ),
    "key without heads": (
        dict(FIXED, key=zeros(12, 16)),
        "key must have at least 3 dimensions, got",
    ),
    "pool without heads": (
        dict(k_pages=zeros(6, 4, 16)),
        "k_pages must have at least 4 dimensions, got",
    ),
    "page_layout": ({"page_layout": "dhn"}, "page_layout must be one of ('nhd', 'hnd'), got 'dhn'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_raise_with_their_place(name):
    arrays, message = WRONG[name]
    with pytest.raises(ValueError, match="^check_inputs: " + re.escape(message)):
        check_inputs(**arrays)


def test_page_layout_hnd_has_the_page_size_in_the_third_place():
    pool = {"k_pages": zeros(6, 2, 4, 16), "block_tables": i32([0, 1]), "page_layout": "hnd"}
    check_inputs(**pool, kv_lengths=i32(8))
    with pytest.raises(ValueError, match="capacity of its row of block_tables, 8"):
        check_inputs(**pool, kv_lengths=i32(9))


def test_sums_of_int32_do_not_wrap():
    with pytest.raises(ValueError, match="more than the capacity"):
        check_inputs(**POOL, key=zeros(1, 3, 2, 16), block_tables=i32([0]), kv_lengths=i32(2**31 - 1))


@pytest.mark.parametrize("name", ["cu_seqlens_q", "q_lengths", "kv_lengths", "segment_ids", "block_tables"])
def test_what_the_functions_refuse_for_its_dtype_is_a_type_error(name):
    shape = (1, 2) if name in ("segment_ids", "block_tables") else (2,)
    for dtype in ("float32", "bool"):
        with pytest.raises(TypeError, match=f"check_inputs: {name} must hold integers, got {dtype}"):
            check_inputs(**{name: np.zeros(shape, dtype)})
        with pytest.raises(TypeError, match=f"check_inputs: {name} must be int32, got {dtype}"):
            check_inputs(**{name: jnp.zeros(shape, dtype)})
    for dtype in ("int64", "uint32"):  # the functions accept these types on the host
        check_inputs(**{name: np.zeros(shape, dtype)})


def test_a_scale_that_is_no_number_is_a_type_error():
    with pytest.raises(TypeError, match="check_inputs: k_scale must be an array, got 'a'"):
        check_inputs(**POOL, k_scale="a")


def test_lists_of_floats_are_type_errors():
    with pytest.raises(TypeError, match="check_inputs: kv_lengths must hold integers, got float64"):
        check_inputs(kv_lengths=[1.5])


def test_shapes_without_values_are_type_errors():
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
    for arrays in ({"kv_lengths": lengths}, {"mask": jax.eval_shape(masks.ranges, lengths, lengths)}):
        with pytest.raises(
            TypeError, match=r"must be an array, got ShapeDtypeStruct\(.*; jax.eval_shape runs"
        ):
            check_inputs(**arrays)


def test_operands_that_are_no_arrays_are_type_errors():
    with pytest.raises(
        TypeError, match="check_inputs: mask must be an array, got the function causal; pass what"
    ):
        check_inputs(mask=masks.causal)
    with pytest.raises(TypeError, match=r"check_inputs: rotary must be a pair \(cos, sin\), got ndarray"):
        check_inputs(rotary=np.zeros((8, 8)))


def test_unknown_names_are_type_errors():
    with pytest.raises(TypeError, match="check_inputs: 'cu_seqlen_q' is no operand of this library"):
        check_inputs(cu_seqlen_q=i32(0, 1))


def test_traced_index_arrays_are_type_errors():
    with pytest.raises(TypeError, match=r"check_inputs: kv_lengths is traced; .* outside jit"):
        jax.jit(lambda x: check_inputs(kv_lengths=x))(i32(1))


def test_traced_operands_give_their_shapes():
    with pytest.raises(ValueError, match=r"cu_seqlens_q\[1\] = 31 is more than query's 30 tokens"):
        jax.jit(lambda q: check_inputs(query=q, cu_seqlens_q=np.array([0, 31], np.int32)))(PACKED["query"])


def test_blocks_that_two_joined_masks_share_are_no_fault_of_the_users():
    one, other = (masks.blocks(jnp.asarray([[[x]]], jnp.int32), (16, 16)) for x in ([0, 1], [1, 2]))
    shapes = {name: jnp.zeros((1, n, 2, 8)) for name, n in (("query", 16), ("key", 48))}
    check_inputs(**shapes, mask=one | other)
    assert (one | other).picture(16, 48)[0] == "#" * 48


@pytest.mark.parametrize("name", ["ranges", "block_mask"])
def test_operands_that_are_no_arguments_are_unknown(name):
    with pytest.raises(TypeError, match=f"'{name}' is no operand of this library"):
        check_inputs(**{name: jnp.zeros((1, 1, 4, 2), jnp.int32)})
