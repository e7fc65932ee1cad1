"""Masks as values: what each form shows, drawn, and what their combinations show."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash import masks
from jax_flash.visible import conjunctions, forms
from jax_flash.visible.rows import Rows


def seen(mask, sq, sk):
    """`[b, h, sq, sk]`, computed from the operands that the kernels would get."""
    visible = conjunctions.resolve(mask.conditions, Rows.fixed(sq, sk))
    assert len(visible.pairs) in (0, 1, 2)
    for lo, hi in visible.pairs:
        assert lo.dtype == hi.dtype == jnp.int32
        assert int(lo.min(initial=0)) >= 0
        assert int(hi.max(initial=0)) <= sk
    if len(visible.pairs) == 2:  # ascending and disjoint
        (_, a), (b, _) = visible.pairs
        assert bool((a <= b).all())
    x = np.asarray(conjunctions.seen(visible, sq, jnp.arange(sk, dtype=jnp.int32)[None]))
    return np.broadcast_to(x, (*x.shape[:2], sq, sk))


def test_causal_with_an_offset_moves_the_diagonal():
    assert masks.causal().picture(3) == ["#..", "##.", "###"]
    assert masks.causal(2).picture(3, 5) == ["###..", "####.", "#####"]
    assert masks.causal(-1).picture(3) == ["...", "#..", "##."]


def test_offsets_and_windows_may_be_data_of_each_batch_entry():
    offset = jnp.array([0, 2], jnp.int32)
    assert masks.causal(offset).picture(2, 4, entry=0) == ["#...", "##.."]
    assert masks.causal(offset).picture(2, 4, entry=1) == ["###.", "####"]
    assert masks.window(jnp.array([1, 0], jnp.int32), 0).picture(3, entry=1) == ["#..", ".#.", "..#"]


def test_a_scan_over_layers_has_a_window_of_its_own_in_each():
    sizes = jnp.array([1, 3], jnp.int32)

    def layer(_, left):
        return None, conjunctions.array_of(masks.window(left, 0).conditions, 4, 4)

    _, both = jax.lax.scan(layer, None, sizes)
    np.testing.assert_array_equal(both[0][0, 0].sum(-1), [1, 2, 2, 2])
    np.testing.assert_array_equal(both[1][0, 0].sum(-1), [1, 2, 3, 4])


def test_a_window_has_two_sides():
    assert masks.window(1, 0).picture(4) == ["#...", "##..", ".##.", "..##"]
    assert masks.window(None, 1).picture(4) == ["##..", "###.", "####", "####"]
    assert masks.window(0, None).picture(3) == ["###", ".##", "..#"]


def test_segments_of_all_entries_and_of_each_combine():
    """Ids of rows that all entries share, and of keys of their own, in either mask."""
    shared = masks.segments([0, 0, 1], [[0, 1, 1], [0, 0, 0]])
    own = masks.segments([[2, 3, 2]], [[2, 2, 3]])
    for both in (shared & own, own & shared):
        assert both.picture(3) == ["#..", "...", ".#."]
        assert both.picture(3, entry=1) == ["##.", "..#", "..."]


def test_segments_attend_to_their_own():
    assert masks.segments(jnp.array([[0, 0, 1]]), jnp.array([[1, 0, 1, 2]])).picture(3, 4) == [
        ".#..",
        ".#..",
        "#.#.",
    ]


def test_ranges_are_half_open_and_two_may_be_joined():
    one = masks.ranges(jnp.array([0, 1]), jnp.array([2, 3]))
    assert one.picture(2, 4) == ["##..", ".##."]
    two = one | masks.ranges(jnp.array([3, 2]), jnp.array([4, 4]))
    assert two.picture(2, 4) == ["##.#", ".###"]
    empty = masks.ranges(jnp.array([3, 1]), jnp.array([1, 1]))
    assert empty.picture(2, 4) == ["....", "...."]
    assert (empty | one).picture(2, 4) == one.picture(2, 4)


def test_positions_need_not_be_indices():
    mask = masks.by_position(jnp.array([[2, 5]]), jnp.array([[0, 2, 2, 4, 7]]))
    assert mask.picture(2, 5) == ["###..", "####."]
    near = masks.by_position(jnp.array([[2, 5]]), jnp.array([[0, 2, 2, 4, 7]]), window=(1, 0))
    assert near.picture(2, 5) == [".##..", "...#."]
    both = masks.by_position(jnp.array([[2, 5]]), jnp.array([[0, 2, 2, 4, 7]]), causal=False, window=(1, 2))
    assert both.picture(2, 5) == [".###.", "...##"]


def test_arrays_may_have_been_moved_to_the_host():
    mask = masks.by_position(jnp.array([[2, 5]]), jnp.array([[0, 2, 2, 4, 7]]), window=(1, 0))
    assert jax.device_get(mask).picture(2, 5) == mask.picture(2, 5)


def test_a_prefix_is_seen_by_all():
    assert masks.prefix_lm(jnp.array([2], jnp.int32)).picture(4) == ["##..", "##..", "###.", "####"]


def test_spans_are_seen_both_ways():
    ids = jnp.array([[-1, 7, 7, -1, 3, 3]])
    assert masks.bidirectional_spans(ids).picture(6) == [
        "#.....",
        "###...",
        "###...",
        "####..",
        "######",
        "######",
    ]


def test_neighbouring_spans_stay_apart():
    assert masks.bidirectional_spans(jnp.array([[0, 0, 1, 1]])).picture(4) == ["##..", "##..", "####", "####"]


def test_chunks_are_causal_within():
    assert masks.chunked(2).picture(5) == ["#....", "##...", "..#..", "..##.", "....#"]


def test_the_first_keys_and_a_window():
    assert masks.first_and_window(1, 1).picture(5) == ["#....", "##...", "###..", "#.##.", "#..##"]


def test_block_diffusion_shows_a_noised_block_itself_and_the_clean_ones_before():
    assert masks.block_diffusion(2).picture(8) == [
        "##......",
        "##......",
        "..####..",
        "..####..",
        "....##..",
        "....##..",
        "....####",
        "....####",
    ]


def test_blocks_count_once_and_minus_one_is_none():
    chosen = jnp.array([[[[0, 0, -1], [2, 0, 5]]]])
    x = seen(masks.blocks(chosen, (16, 16)), 32, 40)
    assert x[0, 0, 0].sum() == 16
    np.testing.assert_array_equal(np.flatnonzero(x[0, 0, 31]), [*range(16), *range(32, 40)])


FORMS = {
    "causal": (lambda: masks.causal(1), lambda i, j: j <= i + 1),
    "window": (lambda: masks.window(3, 1), lambda i, j: (j >= i - 3) & (j <= i + 1)),
    "prefix": (lambda: masks.prefix_lm(5), lambda i, j: (j <= i) | (j < 5)),
    "chunks": (lambda: masks.chunked(4), lambda i, j: (j <= i) & (j // 4 == i // 4)),
    "streaming": (
        lambda: masks.first_and_window(2, 3),
        lambda i, j: (j <= i) & ((j < 2) | (j >= i - 3)),
    ),
    "diffusion": (
        lambda: masks.block_diffusion(3),
        lambda i, j: np.where(
            i < 7,
            np.where(j < 7, i // 3 == j // 3, (j - 7) // 3 < i // 3),
            (j >= 7) & ((j - 7) // 3 <= (i - 7) // 3),
        ),
    ),
    "segments": (
        lambda: masks.segments(jnp.arange(14)[None] // 5),
        lambda i, j: i // 5 == j // 5,
    ),
    "dense": (
        lambda: masks.dense(jnp.asarray(np.add.outer(np.arange(14), np.arange(14))[None, None] % 3 > 0)),
        lambda i, j: (i + j) % 3 > 0,
    ),
}


@pytest.mark.parametrize("first", FORMS)
@pytest.mark.parametrize("second", FORMS)
def test_both_of_two_masks(first, second):
    i, j = np.ogrid[:14, :14]
    (make_a, a), (make_b, b) = FORMS[first], FORMS[second]
    if {first, second} <= {"streaming", "diffusion"}:
        with pytest.raises(ValueError, match="from_function"):
            make_a() & make_b()
        return
    np.testing.assert_array_equal(seen(make_a() & make_b(), 14, 14)[0, 0], a(i, j) & b(i, j))


@pytest.mark.parametrize("first", FORMS)
@pytest.mark.parametrize("second", FORMS)
def test_either_of_two_masks(first, second):
    i, j = np.ogrid[:14, :14]
    (make_a, a), (make_b, b) = FORMS[first], FORMS[second]
    single = {"causal", "window", "prefix", "chunks"}
    if {first, second} <= single or first == second == "dense":
        np.testing.assert_array_equal(seen(make_a() | make_b(), 14, 14)[0, 0], a(i, j) | b(i, j))
    else:
        with pytest.raises(ValueError, match=r"masks\.dense"):
            make_a() | make_b()


def test_a_function_is_kept_as_ranges_where_rows_have_two():
    mask = masks.from_function(lambda b, h, i, j: (j == i) | (j < 2 + h), 6, 6, heads=2)
    (condition,) = mask.conditions
    assert isinstance(condition, forms.Ranges)
    i, j = np.ogrid[:6, :6]
    for h in range(2):
        np.testing.assert_array_equal(seen(mask, 6, 6)[0, h], (j == i) | (j < 2 + h))
    odd = masks.from_function(lambda b, h, i, j: (i + j) % 2 == 0, 6, 6)
    np.testing.assert_array_equal(seen(odd, 6, 6)[0, 0], (i + j) % 2 == 0)


@pytest.mark.parametrize(("size", "kept"), [(128, 128), (256, 256), (384, 128), (64, None), (130, None)])
def test_a_function_is_kept_as_blocks_where_it_consists_of_them(size, kept):
    def f(b, h, i, j):
        return (i // size + j // size + h) % 2 == 0

    mask = masks.from_function(f, 700, 2000, heads=2)
    (condition,) = mask.conditions
    assert getattr(condition, "block", None) == (kept and (kept, kept))
    _, h, i, j = np.ogrid[:1, :2, :700, :2000]
    np.testing.assert_array_equal(seen(mask, 700, 2000), f(0, h, i, j))


def test_packed_rows_count_in_their_sequence():
    starts = np.array([0, 3, 7])
    sequence = jnp.array([0, 0, 0, 1, 1, 1, 1])
    rows = Rows(
        jnp.asarray(np.arange(7) - starts[np.asarray(sequence)], jnp.int32)[None],
        jnp.array([3, 4])[sequence][None],
        jnp.array([3, 4])[sequence][None],
        sequence,
    )
    (pair,) = conjunctions.resolve(masks.prefix_lm(jnp.array([2, 1])).conditions, rows).pairs
    np.testing.assert_array_equal(pair[1][0, 0], [2, 2, 3, 1, 2, 3, 4])
    spans = masks.bidirectional_spans(jnp.array([-1, 4, 4, 4, 4, -1, -1]))
    (pair,) = conjunctions.resolve(spans.conditions, rows).pairs
    np.testing.assert_array_equal(pair[1][0, 0], [1, 3, 3, 2, 2, 3, 4])


def test_a_mask_goes_through_jit_and_vmap():
    @jax.jit
    def count(mask):
        return conjunctions.array_of(mask.conditions, 4, 4).sum()

    assert count(masks.prefix_lm(jnp.array([2], jnp.int32))) == 11
    several = jax.vmap(masks.prefix_lm)(jnp.array([[1], [4]], jnp.int32))
    np.testing.assert_array_equal(jax.vmap(count)(several), [10, 16])


def blocks_of(rows, heads=1):
    return masks.blocks(np.zeros((1, heads, rows, 1), int), (16, 16))


def dense_of(sq, sk):
    return masks.dense(np.ones((1, 1, sq, sk), bool))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: masks.ranges(jnp.zeros(3), jnp.ones(3, jnp.int32)),
            TypeError,
            "lo must be int32, got float32",
        ),
        (lambda: masks.ranges([0.5], [1]), TypeError, "lo must hold integers"),
        (
            lambda: masks.ranges([0, 1, 2], [3, 3]),
            ValueError,
            r"masks.ranges: lo and hi must broadcast to one shape, got \(3,\) and \(2,\)",
        ),
        (
            lambda: masks.segments(jax.ShapeDtypeStruct((3,), jnp.int32)),
            TypeError,
            r"masks.segments: q_ids must be an array, got ShapeDtypeStruct\(.*; jax.eval_shape runs",
        ),
        (
            lambda: masks.dense(jax.ShapeDtypeStruct((1, 1, 2, 2), bool)),
            TypeError,
            r"masks.dense: array must be an array, got ShapeDtypeStruct\(.*; jax.eval_shape runs",
        ),
        (
            lambda: masks.causal(2**40),
            ValueError,
            r"causal: offset must be within ±2147483647, got 1099511627776",
        ),
        (
            lambda: masks.by_position([0], [0], window=5),
            TypeError,
            r"window must be None or a pair \(left, right\), got 5",
        ),
        (
            lambda: masks.by_position([0], [0], causal=1),
            TypeError,
            "masks.by_position: causal must be True or False, got 1",
        ),
        (
            lambda: masks.by_position([0], [0], window=(-1, 0)),
            ValueError,
            "window's left must be ≥ 0, or None .* got -1",
        ),
        (
            lambda: masks.by_position([0], [0], window=(1.5, 0)),
            TypeError,
            "window's left must hold integers, got float64",
        ),
        (
            lambda: masks.blocks(jnp.zeros((1, 1, 1, 1), jnp.int32), 16),
            TypeError,
            r"block must be a pair .* got 16",
        ),
        (
            lambda: masks.from_function(lambda b, h, i, j: j <= i, -3, 3),
            ValueError,
            "sq must be an int of at least 0, got -3",
        ),
        (
            lambda: masks.from_function(lambda b, h, i, j: np.ones((3, 3), bool), 4, 4),
            ValueError,
            r"f must return booleans that broadcast to \(1, 1, 4, 4\), got shape \(3, 3\)",
        ),
        (
            lambda: masks.from_function(lambda b, h, i, j: None, 4, 4),
            TypeError,
            r"f must return booleans \(True = may attend\), got object",
        ),
        (
            lambda: jax.jit(lambda n: masks.from_function(lambda b, h, i, j: j <= i + n, 4, 4))(1),
            TypeError,
            "f depends on a value that is traced",
        ),
        (
            lambda: masks.from_function(lambda b, h, i, j: np.where(j <= i, 0.0, -np.inf), 4, 4),
            TypeError,
            r"masks.from_function: f must return booleans \(True = may attend\), got float64",
        ),
        (
            lambda: masks.from_function(lambda b, h, i, j: np.where(j <= i, 0, -10000), 4, 4),
            TypeError,
            "f must return booleans .* got int64",
        ),
        (
            lambda: masks.causal() & np.ones((2, 2), bool),
            TypeError,
            r"& takes two values of jax_flash.masks, got ndarray; masks.dense\(…\) makes one of a boolean",
        ),
        (lambda: jnp.ones((2, 2), bool) | masks.causal(), TypeError, r"\| takes two values .* got ArrayImpl"),
        (lambda: masks.chunked(0), ValueError, "size must be an int of at least 1, got 0"),
        (lambda: masks.blocks(jnp.zeros((1, 1, 1, 1), jnp.int32), (16, 24)), ValueError, "block has 24"),
        (lambda: masks.dense(jnp.ones((1, 1, 2, 2))), TypeError, "boolean of rank 4"),
        (lambda: masks.segments(jnp.zeros((1, 1, 3), jnp.int32)), ValueError, "q_ids must have rank 1 or 2"),
        (
            lambda: masks.segments([0, 1, 2]) & masks.segments([0, 1]),
            ValueError,
            r"segments.* & segments.* must have q_ids .* of one shape, got \(1, 3\) and \(1, 2\)",
        ),
        (
            lambda: blocks_of(2) & blocks_of(3),
            ValueError,
            r"masks: blocks.* & blocks.* must have chosen .*rows.* got \(1, 1, 2\) and \(1, 1, 3\)",
        ),
        (
            lambda: blocks_of(1) | blocks_of(3),
            ValueError,
            r"masks: blocks.* \| blocks.* must have chosen .*rows.* got \(1, 1, 1\) and \(1, 1, 3\)",
        ),
        (
            lambda: blocks_of(3, heads=2) | blocks_of(3, heads=4),
            ValueError,
            r"chosen .*h\|1.* of one shape, got \(1, 2, 3\) and \(1, 4, 3\)",
        ),
        (
            lambda: dense_of(8, 7) & dense_of(8, 8),
            ValueError,
            r"masks: dense.* & dense.* must have arrays .*sq\|1.* of one shape, got \(1, 1, 8, 7\) and \(1, 1, 8, 8\)",
        ),
        (
            lambda: dense_of(2, 8) | dense_of(8, 1),
            ValueError,
            r"masks: dense.* \| dense.* must have arrays .*sq\|1.* of one shape, got \(1, 1, 2, 8\) and \(1, 1, 8, 1\)",
        ),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_mask_has_no_truth_value():
    """`a or b` would be a alone."""
    with pytest.raises(TypeError, match=r"a mask has no truth value; combine masks by & and \|"):
        masks.causal() or masks.chunked(4)


def test_a_function_that_ignores_batch_and_heads_is_kept_once():
    one = masks.from_function(lambda b, h, i, j: j <= i, 9, 9, batch=3, heads=2)
    assert {x.shape for x in jax.tree.leaves(one)} == {(1, 1, 9)}
    by_head = masks.from_function(lambda b, h, i, j: j <= i + h, 9, 9, batch=3, heads=2)
    assert {x.shape for x in jax.tree.leaves(by_head)} == {(1, 2, 9)}
    assert by_head.picture(9, entry=2, head=1)[0] == "##......."
