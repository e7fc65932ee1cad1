"""Which bands of a mask become the call's own: in its spec, as operands, or not."""

import jax.numpy as jnp
import numpy as np

from jax_flash import masks, validate
from jax_flash.options import FixedArguments

B, S, H, D = 2, 48, 4, 16


def spec_of(mask, **options):
    x = np.zeros((B, S, H, D), np.float32)
    return validate.fixed("flash_attention", FixedArguments(query=x, key=x, value=x, mask=mask, **options))[0]


def test_a_band_of_numbers_is_the_calls_own_band():
    for mask, left, right in (
        (masks.causal(), -1, 0),
        (masks.causal(3), -1, 3),
        (masks.window(5, 2, 1), 4, 3),
        (masks.causal() & masks.window(4), 4, 0),
    ):
        spec = spec_of(mask)
        assert (spec.left, spec.right, spec.align, spec.operands) == (left, right, "top_left", ())
    assert spec_of(masks.causal(-1)).operands == ("window_offset",)
    options = {"window": (4, None), "kv_lengths": np.array([S, 3], np.int32)}  # aligned to the bottom right
    assert spec_of(masks.causal(), **options).operands == ("kv_lengths", "ranges")
    spec = spec_of(masks.causal(), window=(4, None))  # the same with equal lengths
    assert (spec.left, spec.right, spec.align, spec.operands) == (4, 0, "top_left", ())
    slopes = {"alibi_slopes": np.ones(H, np.float32)}
    found = spec_of(masks.causal(), kv_lengths=np.array([S, 3], np.int32), **slopes)
    assert found.operands == ("kv_lengths", "alibi_slopes", "ranges")
    spec = spec_of(masks.causal(), **slopes)
    assert (spec.right, spec.align, spec.operands) == (0, "top_left", ("alibi_slopes",))
    spec = spec_of(masks.causal(), window=(4, 2), align="top_left")
    assert (spec.left, spec.right, spec.operands) == (4, 0, ())


def test_which_bands_become_operands():
    left = jnp.array([3, 4], jnp.int32)
    band = lambda spec: (spec.left, spec.right, spec.align, spec.operands)  # noqa: E731
    assert band(spec_of(masks.window(left, 0))) == (-1, 0, "top_left", ("window_left",))
    assert band(spec_of(masks.window(5, left, left))) == (
        5,
        -1,
        "top_left",
        ("window_right", "window_offset"),
    )
    assert band(spec_of(masks.causal() & masks.window(left))) == (-1, 0, "top_left", ("window_left",))
    assert band(spec_of(masks.window(-2, left[0]))) == (
        -1,
        -1,
        "top_left",
        ("window_left", "window_right"),
    )
    both = masks.prefix_lm(jnp.int32(3)) & masks.window(left)
    assert spec_of(both).operands == ("ranges", "window_left")
    for mask, options in (
        (masks.window(None, 0, left), {"window": (9, None), "align": "top_left"}),  # two diagonals
        (masks.window(left) & masks.causal(left), {}),
        (masks.window(left), {"window": (9, None), "align": "top_left"}),
    ):
        assert spec_of(mask, **options).operands == ("ranges",)
    causal = {"causal": True}  # aligned to the bottom right, which only equal lengths make the top left
    assert band(spec_of(masks.window(left), **causal)) == (-1, 0, "top_left", ("window_left",))
    lengths = causal | {"kv_lengths": np.array([48, 7], np.int32)}
    assert spec_of(masks.window(left), **lengths).operands == ("kv_lengths", "ranges")
    slopes = {"alibi_slopes": np.ones(4, np.float32)}
    assert spec_of(masks.window(left), **slopes).operands == ("alibi_slopes", "ranges")
    blocks = masks.blocks(np.zeros((1, 1, 3, 1), np.int32), (16, 16))
    assert spec_of(masks.window(left) & blocks).operands == ("ranges", "block_mask")
