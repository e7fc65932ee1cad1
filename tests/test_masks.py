"""Which query sees which key, drawn: a row of text per query, `#` where it attends to a key.

The pictures come from attention itself: equal scores and the identity for values give P as the result, and
the identity for the cotangent gives Pᵀ as value's gradient, so each picture is that of forward and backward.
"""

from functools import partial

import checks
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES, make_inputs, poisoned

from jax_flash import flash_attention, flash_attention_varlen

HEAD_DIM = 8


def draw(implementation, *, s_q, s_k, causal=None, b=1, heads=1, entry=0, head=0, **options):
    """The picture of one head of one batch entry; `causal` may name the alignment."""
    function = partial(flash_attention, **_align(causal), **options)
    return _draw(function, implementation, (b, s_q), (b, s_k), heads)[entry][head]


def draw_packed(implementation, *, q, k=None, q_rows=None, k_rows=None, causal=None, **options):
    """The picture of a packed batch: all query tokens against all keys; q and k are offsets."""
    q_rows, k_rows = q_rows or q[-1], k_rows or (k or q)[-1]
    offsets = [None if cu is None else jnp.asarray(cu, jnp.int32) for cu in (q, k)]

    def function(query, key, value, **keywords):
        return flash_attention_varlen(query, key, value, *offsets, **_align(causal), **options, **keywords)

    return _draw(function, implementation, (q_rows,), (k_rows,), 1)[0][0]


def _align(causal):
    return {"causal": True, "align": causal} if isinstance(causal, str) else {"causal": bool(causal)}


def _draw(function, implementation, q_dims, k_dims, heads):
    s_q, s_k = q_dims[-1], k_dims[-1]
    dv = -(-max(s_q, s_k) // 8) * 8
    query = jnp.zeros((*q_dims, heads, HEAD_DIM), jnp.float32)
    key = jnp.zeros((*k_dims, heads, HEAD_DIM), jnp.float32)
    value = jnp.broadcast_to(jnp.eye(s_k, dv)[:, None], (*k_dims, heads, dv))
    dout = jnp.broadcast_to(jnp.eye(s_q, dv)[:, None], (*q_dims, heads, dv))

    @jax.jit
    def run(value, dout):
        def attend(value):
            return function(query, key, value, return_lse=True, implementation=implementation)

        out, pullback, lse = jax.vjp(attend, value, has_aux=True)
        return out, lse, *pullback(dout)

    out, lse, dvalue = run(value, dout)
    forward = np.asarray(jnp.swapaxes(out, -3, -2)[..., :s_k])  # P    [..., h, sq, sk]
    backward = np.asarray(jnp.moveaxis(dvalue, -3, -1)[..., :s_q, :])  # from Pᵀ  [..., h, sq, sk]
    np.testing.assert_allclose(backward, forward, atol=1e-6)
    _assert_uniform(forward, np.asarray(lse))
    return [[_text(p) for p in entry] for entry in forward.reshape(-1, heads, s_q, s_k)]


def _assert_uniform(p, lse):
    """Asserts that every visible key has the same weight, and that lse is the log of their number."""
    seen = (p > 0).sum(-1, keepdims=True)
    np.testing.assert_allclose(p, (p > 0) / np.maximum(seen, 1), atol=1e-6)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(lse, np.log(seen[..., 0]), atol=1e-5)


def _text(p):
    return ["".join(".#"[int(weight > 0)] for weight in row) for row in p]


@pytest.fixture
def picture(implementation):
    return partial(draw, implementation)


@pytest.fixture
def packed(implementation):
    return partial(draw_packed, implementation)


def test_without_a_mask_everything_is_seen(picture):
    assert picture(s_q=2, s_k=3) == ["###", "###"]


def test_causal(picture):
    assert picture(causal=True, s_q=3, s_k=3) == ["#..", "##.", "###"]


def test_bottom_right_causal_lets_the_last_query_see_everything(picture):
    assert picture(causal="bottom_right", s_q=3, s_k=5) == ["###..", "####.", "#####"]


def test_bottom_right_causal_leaves_the_first_of_more_queries_nothing(picture):
    assert picture(causal="bottom_right", s_q=5, s_k=3) == ["...", "...", "#..", "##.", "###"]


def test_top_left_causal_starts_at_the_first_key(picture):
    assert picture(causal="top_left", s_q=3, s_k=5) == ["#....", "##...", "###.."]


def test_top_left_causal_with_more_queries(picture):
    assert picture(causal="top_left", s_q=5, s_k=3) == ["#..", "##.", "###", "###", "###"]


def test_causal_160_by_192_never_sees_the_future(picture):
    rows = picture(causal=True, s_q=160, s_k=192)
    assert rows == ["#" * (i + 33) + "." * (159 - i) for i in range(160)]


def test_window(picture):
    assert picture(window=(1, 2), s_q=5, s_k=5) == ["###..", "####.", ".####", "..###", "...##"]


def test_window_of_the_diagonal(picture):
    assert picture(window=(0, 0), s_q=3, s_k=3) == ["#..", ".#.", "..#"]


def test_window_lies_around_the_diagonal_of_the_alignment(picture):
    assert picture(window=(1, 0), s_q=3, s_k=5) == [".##..", "..##.", "...##"]
    assert picture(window=(1, 0), align="top_left", s_q=3, s_k=5) == ["#....", "##...", ".##.."]


def test_window_unlimited_to_the_left(picture):
    assert picture(window=(None, 1), s_q=4, s_k=4) == ["##..", "###.", "####", "####"]


def test_window_unlimited_to_the_right(picture):
    assert picture(window=(1, None), s_q=4, s_k=4) == ["####", "####", ".###", "..##"]


def test_window_unlimited_on_both_sides(picture):
    assert picture(window=(None, None), s_q=2, s_k=3) == ["###", "###"]


def test_causal_closes_the_right_of_a_window(picture):
    assert picture(causal=True, window=(1, 2), s_q=4, s_k=4) == ["#...", "##..", ".##.", "..##"]


def test_window_that_lies_beside_all_keys(picture):
    assert picture(window=(1, 0), align="top_left", s_q=5, s_k=2) == ["#.", "##", ".#", "..", ".."]


def test_window_wider_than_everything(picture):
    for left, right in ((2**31 - 1, 2**31 - 2), (2**31, 2**40)):
        assert picture(window=(left, right), s_q=2, s_k=3) == ["###", "###"]


def test_window_longer_than_a_tile(picture):
    rows = picture(window=(70, 3), s_q=150, s_k=150)
    assert rows == ["".join(".#"[i - 70 <= j <= i + 3] for j in range(150)) for i in range(150)]


def test_mask(picture):
    mask = jnp.array([[True, False, True], [False, False, False]])
    assert picture(mask=mask, s_q=2, s_k=3) == ["#.#", "..."]


def test_mask_and_causal_both_hold(picture):
    mask = jnp.array([[True, False, True]])
    assert picture(mask=mask, causal=True, s_q=3, s_k=3) == ["#..", "#..", "#.#"]


def test_mask_of_queries(picture):
    mask = jnp.array([[True], [False], [True]])
    assert picture(mask=mask, s_q=3, s_k=2) == ["##", "..", "##"]


def test_mask_of_one_head(picture):
    mask = jnp.array([True, False])[None, :, None, None]
    assert picture(mask=mask, heads=2, head=0, s_q=2, s_k=2) == ["##", "##"]
    assert picture(mask=mask, heads=2, head=1, s_q=2, s_k=2) == ["..", ".."]


def test_mask_of_one_batch_entry(picture):
    mask = jnp.array([True, False])[:, None, None, None]
    assert picture(mask=mask, b=2, entry=0, s_q=2, s_k=2) == ["##", "##"]
    assert picture(mask=mask, b=2, entry=1, s_q=2, s_k=2) == ["..", ".."]


def test_bias_of_minus_infinity_masks(picture):
    bias = jnp.array([[0, -jnp.inf, 0], [-jnp.inf, -jnp.inf, -jnp.inf]], jnp.float32)
    assert picture(bias=bias, s_q=2, s_k=3) == ["#.#", "..."]


def test_segments(picture):
    ids = jnp.array([[0, 0, 1, 2]], jnp.int32)
    assert picture(segment_ids=ids, s_q=4, s_k=4) == ["##..", "##..", "..#.", "...#"]


def test_segments_need_no_order_and_may_have_no_partner(picture):
    ids = jnp.array([[7, -1, 3]], jnp.int32), jnp.array([[-1, 7, 7, -1]], jnp.int32)
    assert picture(segment_ids=ids, s_q=3, s_k=4) == [".##.", "#..#", "...."]


def test_the_diagonal_is_the_batch_entrys_not_the_segments(picture):
    ids = jnp.array([[0, 0, 1]], jnp.int32), jnp.array([[0, 1, 1, 1]], jnp.int32)
    assert picture(segment_ids=ids, causal=True, s_q=3, s_k=4) == ["#...", "#...", ".###"]


def test_lengths(picture):
    lengths = {"q_lengths": jnp.array([2], jnp.int32), "kv_lengths": jnp.array([3], jnp.int32)}
    assert picture(**lengths, s_q=3, s_k=4) == ["###.", "###.", "...."]


def test_bottom_right_counts_from_the_lengths_in_use(picture):
    lengths = {"q_lengths": jnp.array([2], jnp.int32), "kv_lengths": jnp.array([3], jnp.int32)}
    assert picture(causal="bottom_right", **lengths, s_q=3, s_k=4) == ["##..", "###.", "...."]
    assert picture(causal="top_left", **lengths, s_q=3, s_k=4) == ["#...", "##..", "...."]


def test_a_length_moves_the_diagonal_even_alone(picture):
    kv_lengths = jnp.array([1], jnp.int32)
    assert picture(causal=True, kv_lengths=kv_lengths, s_q=3, s_k=4) == ["....", "....", "#..."]


def test_lengths_are_those_of_each_batch_entry(picture):
    kv_lengths = jnp.array([0, 1, 2], jnp.int32)
    pictures = [picture(kv_lengths=kv_lengths, b=3, entry=z, s_q=1, s_k=2) for z in range(3)]
    assert pictures == [[".."], ["#."], ["##"]]


def test_lengths_are_clamped_to_the_operand(picture):
    lengths = {"q_lengths": jnp.array([9, -9], jnp.int32), "kv_lengths": jnp.array([9, 9], jnp.int32)}
    assert picture(**lengths, causal=True, b=2, entry=0, s_q=2, s_k=2) == ["#.", "##"]
    assert picture(**lengths, causal=True, b=2, entry=1, s_q=2, s_k=2) == ["..", ".."]


def test_packed_sequences_do_not_see_each_other(packed):
    assert packed(q=[0, 2, 5]) == ["##...", "##...", "..###", "..###", "..###"]


def test_packed_causal(packed):
    assert packed(q=[0, 2, 5], causal=True) == ["#....", "##...", "..#..", "..##.", "..###"]


def test_packed_causal_is_aligned_by_each_sequences_own_lengths(packed):
    offsets = {"q": [0, 2, 5], "k": [0, 3, 4]}
    assert packed(**offsets, causal="bottom_right") == ["##..", "###.", "....", "....", "...#"]
    assert packed(**offsets, causal="top_left") == ["#...", "##..", "...#", "...#", "...#"]


def test_packed_window(packed):
    assert packed(q=[0, 3, 6], window=(1, 0)) == ["#.....", "##....", ".##...", "...#..", "...##.", "....##"]


def test_packed_lengths_of_the_keys_in_use(packed):
    kv_lengths = jnp.array([1, 2], jnp.int32)
    assert packed(q=[0, 2, 5], kv_lengths=kv_lengths) == ["#....", "#....", "..##.", "..##.", "..##."]
    assert packed(q=[0, 2, 5], kv_lengths=kv_lengths, causal=True) == [
        ".....",
        "#....",
        ".....",
        "..#..",
        "..##.",
    ]


def test_packed_lengths_are_clamped_to_the_sequence(packed):
    kv_lengths = jnp.array([99, -1], jnp.int32)
    assert packed(q=[0, 2, 3], kv_lengths=kv_lengths) == ["##.", "##.", "..."]


def test_packed_empty_sequences(packed):
    assert packed(q=[0, 0, 2, 2, 3, 3]) == ["##.", "##.", "..#"]


def test_packed_sequence_without_keys(packed):
    assert packed(q=[0, 1, 2], k=[0, 0, 2]) == ["..", "##"]


def test_packed_padding_is_seen_by_no_one_and_sees_no_one(packed):
    assert packed(q=[0, 1, 3], q_rows=4, k_rows=5, k=[0, 1, 3]) == ["#....", ".##..", ".##..", "....."]


def test_packed_tokens_in_front_are_padding_too(packed):
    assert packed(q=[1, 3]) == ["...", ".##", ".##"]


def test_packed_offsets_are_read_as_their_running_maximum_within_the_operand(packed):
    assert packed(q=[0, 3, 1, 99], q_rows=4, k_rows=4) == ["###.", "###.", "###.", "...#"]
    assert packed(q=[-5, 2, 2, 1], q_rows=3, k_rows=3) == ["##.", "##.", "..."]


def test_packed_without_sequences(packed):
    assert packed(q=[0], q_rows=2, k_rows=2) == ["..", ".."]


HIDDEN = [case for case in CASES if case.q_lengths or case.kv_lengths or any(case.padding)]


@pytest.mark.parametrize("case", HIDDEN, ids=lambda case: case.name)
def test_what_is_never_read_may_be_nan(case, implementation):
    got = checks.run(case, poisoned(case, make_inputs(case)), implementation)
    oracle.assert_result(got, *checks.references(case), case)
