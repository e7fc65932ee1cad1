"""Errors of masks as values, and of calls whose mask does not fit."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash import dot_product_attention, flash_attention, flash_attention_varlen, masks, paged_attention
from jax_flash.flax import attention_fn

S = 48
X = [jnp.zeros((2, S, heads, 16)) for heads in (4, 2, 2)]
I = partial(np.zeros, dtype=np.int32)  # noqa: E741
PACKED = [X[0][0], X[1][0], X[2][0], [0, S]]
ONE_KEY = {
    "kv_positions": masks.by_position(np.zeros((1, 48), np.int32), np.zeros((1, 1), np.int32)),
    "span ids": masks.bidirectional_spans(np.zeros((2, 1), np.int32)),
    "segments of keys": masks.segments(np.zeros((1, 48), np.int32), np.zeros(1, np.int32)),
}
BLOCKED = [np.zeros((1, 768, 1, 8), np.float32)] * 3
CALLS = [
    partial(flash_attention, *X),
    partial(flash_attention_varlen, *PACKED),
    partial(paged_attention, X[0], X[1], X[2], np.arange(2)[:, None], S),
    partial(attention_fn, *X),
    partial(dot_product_attention, *X),
]
MANY_RANGES = masks.from_function(lambda b, h, i, j: (i + j) % 2 == 0, S, S)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        *((lambda f=f: masks.from_function(f, S, S), TypeError,
           rf"^masks.from_function: f must be a function of \(b, h, i, j\), got {f}$") for f in (3, None)),
        (lambda: masks.causal().picture(-1), ValueError, "^masks: picture: sq must be at least 0, got -1$"),
        (lambda: masks.causal().picture(3, 2.5), TypeError, "^masks: picture: sk must be an int, got 2.5$"),
        *((lambda call=call: call(mask=masks.causal), TypeError, r"got the function causal; pass what it returns$")
          for call in CALLS),
        (lambda: flash_attention(*X, mask=masks.prefix_lm(I(3))), ValueError,
         r"flash_attention: mask's lengths must broadcast to \[b\] = \(2,\), got shape \(3,\)"),
        (lambda: flash_attention(*X, mask=masks.bidirectional_spans(I((1, 5)))), ValueError,
         r"mask's span ids must broadcast to \[b sq\] = \(2, 48\), got shape \(1, 5\)"),
        (lambda: flash_attention(*X, mask=masks.ranges(I((3, 48)), I(48))), ValueError,
         r"mask's lo must broadcast to \[b hq sq\] = \(2, 4, 48\), got shape \(3, 48\)"),
        (lambda: flash_attention(*X, mask=masks.by_position(I((1, 48)), I((1, 4)))), ValueError,
         r"mask's kv_positions must broadcast to \[b sk\] = \(2, 48\)"),
        (lambda: flash_attention(*X, mask=masks.dense(np.ones((1, 1, 1, 4), bool))), ValueError,
         r"mask's dense array must broadcast to"),
        (lambda: flash_attention(*X, mask=masks.blocks(I((1, 1, 2, 1)), (16, 16))), ValueError,
         r"mask's chosen blocks must have shape \[2 or 1, 4, 2 or 1, 3, n\], got \(1, 1, 2, 1\)"),
        (lambda: flash_attention_varlen(*PACKED, mask=masks.dense(np.ones((1, 1, 5, S), bool))), ValueError,
         r"mask's dense array must have shape \[1, 1 or 4, 1 or 48 tokens, keys\], got"),
        (lambda: flash_attention_varlen(*PACKED, mask=masks.dense(np.ones((1, 1, S, S), bool)) & MANY_RANGES),
         ValueError, r"mask joins masks\.from_function\(…\) with masks\.dense\(…\)"),
        (lambda: flash_attention_varlen(
            *PACKED, mask=masks.dense(np.ones((1, 1, S, 1), bool)) | masks.dense(np.ones((1, 1, S, 5), bool))
        ), ValueError, r"or two masks\.dense\(…\) of other rows or keys by \|"),
        (lambda: flash_attention_varlen(*PACKED, mask=masks.segments(I(S - 1))), ValueError,
         r"mask's segments of queries must broadcast to \[tq\] = \(48,\), got shape \(47,\)"),
        (lambda: flash_attention_varlen(*PACKED, mask=masks.bidirectional_spans(I((2, S)))), ValueError,
         r"mask's span ids must broadcast to \[tq\] = \(48,\), got shape \(2, 48\)"),
        (lambda: flash_attention_varlen(*PACKED, mask=masks.ranges(I((2, 1, S)), 3)), ValueError,
         r"mask's lo must broadcast to \[hq tq\] = \(4, 48\), got shape \(2, 1, 48\)"),
        (lambda: flash_attention_varlen(*PACKED, mask=masks.from_function(lambda b, h, i, j: j < b, 5, 5, batch=2)),
         ValueError, r"mask's from_function must broadcast to \[n hq sq\] = \(1, 4, 5\), got shape \(2, 1, 5\)"),
        (lambda: flash_attention(*X, mask=masks.from_function(lambda b, h, i, j: j <= i, 5, S)), ValueError,
         r"mask's from_function must broadcast to \[b hq sq\] = \(2, 4, 48\), got shape \(1, 1, 5\)"),
        *((lambda sk=sk: flash_attention(*X, mask=masks.from_function(lambda b, h, i, j: j <= i, S, sk)), ValueError,
           f"mask's from_function has sk {sk}, which differs from the call's 48") for sk in (1, 47, 64)),
        (lambda: flash_attention(
            *BLOCKED, mask=masks.from_function(lambda b, h, i, j: (i // 128 + j // 128) % 2 == 0, 768, 640)
        ), ValueError, "mask's from_function has sk 640, which differs from the call's 768"),
        (lambda: flash_attention_varlen(*PACKED[:3], [0, 3, S], mask=masks.dense(np.ones((1, 1, 5, S), bool))),
         ValueError, r"must have shape \[1, 1 or 4, 1 or 48 tokens, keys\], or by sequence \[2, …\], got"),
        *((lambda mask=mask: flash_attention(*X, mask=mask), ValueError, f"mask's {name} has keys 1, .* the call's 48")
          for name, mask in ONE_KEY.items()),
        (lambda: flash_attention_varlen(*PACKED, mask=masks.segments(I(S), I(1))), ValueError,
         r"mask's segments of keys has keys 1, which differs from the call's 48"),
        (lambda: flash_attention_varlen(*PACKED, mask=masks.bidirectional_spans(I((1, 1)))), ValueError,
         r"mask's span ids has keys 1, which differs from the call's 48"),
        (lambda: paged_attention(X[0][:, :1], *np.zeros((2, 4, 8, 2, 16)), I((2, 2)), I(2),
                                 mask=masks.segments(I((2, 1)))), ValueError,
         r"paged_attention: mask's segments of keys has keys 1, which differs from the call's 16"),
        (lambda: flash_attention_varlen(*PACKED, mask=np.ones((S, S), bool)), TypeError,
         r"mask must be a value of jax_flash\.masks, got ndarray"),
        *((lambda make=make: jax.jit(make)(3), TypeError, "is compiled in, so it must be an int, got .*; make it a")
          for make in (masks.chunked, masks.block_diffusion)),
        (lambda: masks.ranges(0, 1 << 31), ValueError, "masks.ranges: hi holds 2147483648, allowed are the values of"),
        (lambda: masks.ranges(True, 3), TypeError, "masks.ranges: lo must hold integers, got bool"),
    ],
)  # fmt: skip
def test_errors_name_the_mask(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("f", [lambda i, j: j <= i, lambda b, h, i, j: j <= i and i > 1])
def test_the_error_of_a_function_that_takes_single_numbers_says_what_it_is_given(f):
    with pytest.raises((TypeError, ValueError)) as caught:
        masks.from_function(f, 4, 4)
    (note,) = caught.value.__notes__
    assert note.startswith("masks.from_function: f is called as f(b, h, i, j), with integer arrays")
