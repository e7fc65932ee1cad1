"""What repr shows of a mask: a small picture, or its name."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash import masks


def test_repr_draws_a_small_one():
    assert repr(masks.causal() & masks.chunked(4)).splitlines()[:3] == [
        "Mask(causal & chunked)",
        "#.......",
        "##......",
    ]


def test_repr_draws_the_corner_of_a_larger_one():
    drawn = repr(masks.segments(jnp.arange(40)[None] // 3, jnp.arange(50)[None] // 2)).splitlines()
    assert len(drawn) == 17
    assert drawn[1:5] == ["##" + "." * 14] * 3 + ["..##" + "." * 12]
    assert (
        repr(masks.prefix_lm(3) & masks.dense(jnp.ones((1, 1, 2000, 2000), bool)))
        == "Mask(prefix_lm & dense)"
    )


def test_repr_of_many_entries_names_the_mask():
    """A picture would need memory for the pairs of all entries and heads."""
    ids, lo = np.zeros((512, 64), int), np.zeros((1, 64, 64), int)
    assert repr(masks.segments(ids) & masks.ranges(lo, 9)) == "Mask(ranges & segments)"


def drawn(mask):
    return repr(mask).splitlines()[1:]


def test_repr_takes_the_sizes_of_all_arrays():
    """Arrays of joined masks, arrays that entries share, and blocks, of which the last may be longer than the rows."""
    ids, lo = np.arange(40).reshape(2, 20) // 3, np.arange(20) // 2
    joined = drawn(masks.ranges(lo, lo + 3) | masks.ranges(lo + 5, lo + 6))
    assert len(joined) == 16
    assert joined[2:4] == [".###..#........."] * 2
    assert drawn(masks.segments(ids) & masks.blocks(np.ones((1, 1, 2, 1), int), (16, 16)))[15] == "." * 16
    assert drawn(masks.segments(ids) & masks.dense(np.ones((2, 1, 1, 20), bool)))[3] == "...###.........."
    assert drawn(masks.segments(ids) & masks.ranges(0, np.array([2, 9])[:, None, None]))[0][:3] == "##."


def test_repr_names_a_mask_that_it_cannot_draw():
    ids = np.zeros((2, 8), int)
    two = masks.ranges(np.zeros((2, 1, 8), int), np.full((2, 1, 8), 4))
    deleted = masks.ranges(jnp.zeros(3, jnp.int32), 2)
    jax.tree.leaves(deleted)[0].delete()
    for mask in (
        masks.segments(ids[:0]),
        jax.tree.map(lambda *x: jnp.stack(x), two, two),
        jax.eval_shape(lambda: masks.segments(ids)),
        jax.tree.map(lambda _: 0, masks.segments(ids)),
        jax.tree.map(lambda _: None, masks.by_position(ids, ids)),
        masks.segments(ids) & masks.ranges(0, np.zeros(3, int)),
        deleted,
    ):
        assert repr(mask) == f"Mask({mask!s})"


IDS = np.zeros((2, 19), np.int32)


@pytest.mark.parametrize(
    ("mask", "named"),
    [
        (masks.bidirectional_spans(IDS), "span ids must broadcast to [b sq] = (2, 13), got shape (2, 19)"),
        (masks.segments(IDS), "segments of queries must broadcast to [b sq]"),
        (masks.segments(IDS[:, :13], IDS[:, :5]), "segments of keys must broadcast to [b sk]"),
        (masks.ranges(0, IDS[:, None]) | masks.causal(), "lo must broadcast to [b hq sq]"),
        (masks.by_position(IDS[:, :13], IDS[:, :5]), "kv_positions must broadcast to [b sk]"),
        (masks.blocks([[[[0], [1]]]], (16, 16)), "chosen blocks must have shape"),
        (masks.dense(np.ones((1, 1, 19, 19), bool)), "dense array must broadcast to"),
    ],
    ids=lambda x: str(x)[:12],
)
def test_a_picture_of_sizes_that_the_mask_does_not_have_is_refused(mask, named):
    with pytest.raises(ValueError, match=re.escape(f"masks: picture: mask's {named}")):
        mask.picture(13, 19)


def test_masks_of_a_batch_that_hide_nothing_are_drawn():
    positions, offset = jnp.zeros((2, 3), jnp.int32), jnp.array([0, 2], jnp.int32)
    everything = masks.window(None, None, offset), masks.by_position(positions[:1], positions, causal=False)
    for mask in (*everything, everything[0] | everything[1]):
        assert mask.picture(3, entry=1) == ["###"] * 3
        assert repr(mask).count("###") >= 3
    assert (everything[1] & masks.causal(offset)).picture(3, entry=1) == ["###"] * 3
    with pytest.raises(
        ValueError, match=r"q_positions must broadcast to \[b sq\] = \(2, 4\), got shape \(1, 3\)"
    ):
        everything[1].picture(4)
    with pytest.raises(ValueError, match=r"offset must broadcast to \[b\] = \(3,\), got shape \(2,\)"):
        (everything[0] & masks.prefix_lm(jnp.ones(3, jnp.int32))).picture(3)


def test_a_picture_is_of_an_entry_and_a_head_that_the_mask_has():
    mask = masks.dense(jnp.arange(12).reshape(2, 3, 1, 2) % 5 < 1)
    assert mask.picture(1, 2, entry=1, head=2) == ["#."]
    assert masks.causal().picture(2, entry=7, head=np.int64(3)) == ["#.", "##"]
    for wrong, size in (({"entry": 2}, 2), ({"entry": -1}, 2), ({"head": 3}, 3), ({"head": 1.0}, 3)):
        ((name, index),) = wrong.items()
        with pytest.raises(
            ValueError, match=rf"masks: picture: {name} must be .* \[0, {size}\), .* got {index}"
        ):
            mask.picture(1, 2, **wrong)


def test_a_mask_without_conditions_shows_everything():
    everything = masks.Mask(())
    for mask in (everything, everything | masks.causal(), masks.causal() | everything):
        assert mask.picture(2) == ["##", "##"]
    assert (everything & masks.causal()).picture(2) == ["#.", "##"]
