"""Which kinds of numbers and arrays are taken as arguments, and which errors the others raise."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flash
from jax_flash import dot_product_attention, flash_attention, philox
from jax_flash.flax import attention_fn

B, S, H, D = 2, 6, 2, 8
QUERY, KEY, VALUE = np.random.default_rng(0).standard_normal((3, B, S, H, D)).astype(np.float32)
each_number = pytest.mark.parametrize(
    "two",
    [np.float32(2), np.float64(2), np.int64(2), np.array(2.0), jnp.float32(2), jnp.bfloat16(2), jnp.int32(2)],
    ids=lambda x: f"{type(x).__name__}-{x.dtype}",
)


@each_number
@pytest.mark.parametrize("name", ["scale", "softcap"])
def test_a_number_whose_value_is_known_is_taken_whatever_its_type(name, two):
    got, wanted = (flash_attention(QUERY, KEY, VALUE, **{name: x}) for x in (two, 2.0))
    np.testing.assert_array_equal(got, wanted)


def test_a_known_array_of_jax_is_taken_inside_jit_too():
    scale = jnp.float32(2)
    got = jax.jit(lambda query: flash_attention(query, KEY, VALUE, scale=scale))(QUERY)
    np.testing.assert_array_equal(got, flash_attention(QUERY, KEY, VALUE, scale=2.0))


@pytest.mark.parametrize(
    "wrong", [np.ones(1), jnp.ones(1), np.array(True), jnp.array(True), np.array("2"), 2j]
)
def test_what_is_no_single_number_is_refused(wrong):
    with pytest.raises(TypeError, match="scale must be a Python number"):
        flash_attention(QUERY, KEY, VALUE, scale=wrong)


def test_a_traced_scale_goes_where_its_error_says():
    with pytest.raises(TypeError, match=r"scale .* traced value; multiply query by it and pass scale=1.0"):
        jax.jit(lambda scale: flash_attention(QUERY, KEY, VALUE, scale=scale))(0.5)
    got = jax.jit(lambda scale: flash_attention(scale * QUERY, KEY, VALUE, scale=1.0))(0.5)
    np.testing.assert_array_equal(got, flash_attention(QUERY, KEY, VALUE, scale=0.5))


@pytest.mark.parametrize("name", ["scale", "softcap"])
@pytest.mark.parametrize("number", [1e60, -1e60, 3e38, 10**400])
def test_numbers_that_float32_does_not_hold_are_refused(name, number):
    with pytest.raises(ValueError, match=f"{name} must be (within ±2e\\+38|finite|positive)"):
        flash_attention(QUERY, KEY, VALUE, **{name: number})


@pytest.mark.parametrize("options", [dict(scale=2e38), dict(softcap=1e32), dict(softcap=1.2e-38)], ids=str)
def test_the_largest_and_smallest_numbers_that_are_taken_give_no_nan(implementation, options):
    """Scores are 0 here, which times an infinite factor would be NaN."""
    out = flash_attention(0 * QUERY, KEY, VALUE, implementation=implementation, **options)
    np.testing.assert_allclose(out, np.broadcast_to(VALUE.mean(1, keepdims=True), out.shape), atol=1e-6)


@pytest.mark.parametrize("wrong", [[[1.0, 2.0], [3.0]], (None, None)], ids=["ragged", "None"])
@pytest.mark.parametrize("name", ["query", "mask", "sinks"])
def test_lists_that_are_no_arrays_are_refused_by_the_argument(name, wrong):
    given = {"query": QUERY, "key": KEY, "value": VALUE} | {name: wrong}
    with pytest.raises(TypeError, match=f"flash_attention: {name} must be .*array.*, got (list|tuple)"):
        flash_attention(**given)


@pytest.mark.parametrize("name", ["align", "implementation"])
def test_arrays_for_names_are_refused_by_the_argument(name):
    with pytest.raises(ValueError, match=f"flash_attention: {name} must be .*one of"):
        flash_attention(QUERY, KEY, VALUE, **{name: np.array([1.0, 2.0])})


def test_a_softcap_of_0_is_none(implementation):
    got, wanted = (
        flash_attention(QUERY, KEY, VALUE, softcap=cap, implementation=implementation) for cap in (0, None)
    )
    np.testing.assert_array_equal(got, wanted)


def test_a_dropout_rate_drops_all_only_where_it_would_round_to_1_which_is_refused(implementation):
    def dropped(rate):
        return flash_attention(
            *np.ones((3, 1, 256, 4, D), np.float32), dropout_rate=rate, dropout_key=jax.random.key(0),
            implementation=implementation,
        )  # fmt: skip

    # The largest number below 1 with one digit more than the resolution.
    most = 1 - 1.01 / (2 * philox.NUMBERS)
    assert philox.threshold(most) == philox.NUMBERS - 1
    assert np.count_nonzero(dropped(most)) > 0
    for rate in (0.99999, 1 - 1 / (2 * philox.NUMBERS), math.nextafter(1, 0)):
        with pytest.raises(
            ValueError, match="dropout_rate must be below 1 when rounded to a multiple of 1/32768"
        ):
            dropped(rate)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (
            QUERY.astype(">f4"),
            r"query has dtype >f4, which JAX does not have; cast it with .astype\('float32'\)$",
        ),
        (QUERY.astype(object), "query has dtype object, which JAX does not have$"),
        (QUERY.astype(str), "query has dtype <U32, which JAX does not have$"),
        (object(), "query must be an array, got object$"),
    ],
    ids=["big-endian", "object", "strings", "no array"],
)
def test_an_array_that_jax_cannot_hold_is_named_by_its_dtype(query, message):
    with pytest.raises(TypeError, match=message):
        flash_attention(query, KEY, VALUE)


def test_integers_on_the_host_may_be_big_endian_or_objects():
    wanted = flash_attention(QUERY, KEY, VALUE, kv_lengths=[3, 4])
    for dtype in (">i4", object):
        got = flash_attention(QUERY, KEY, VALUE, kv_lengths=np.array([3, 4], dtype))
        np.testing.assert_array_equal(got, wanted)
    for wrong in ([3, None], [3, 4.5], [3, True]):
        with pytest.raises(TypeError, match="kv_lengths must hold integers, got object"):
            flash_attention(QUERY, KEY, VALUE, kv_lengths=np.array(wrong, object))
    with pytest.raises(ValueError, match=f"kv_lengths holds {2**70}, allowed are the values of int32"):
        flash_attention(QUERY, KEY, VALUE, kv_lengths=[3, 2**70])


def test_a_mask_of_rank_3_says_by_its_rank_4_whether_batch_or_heads_come_first():
    """Batch and heads are both 2 here: `[2, sq, sk]` could be either."""
    mask = np.random.default_rng(1).random((2, S, S)) < 0.7
    by_batch, by_head = (flash_attention(QUERY, KEY, VALUE, mask=m) for m in (mask[:, None], mask[None]))
    assert not np.allclose(by_batch, by_head)
    with pytest.raises(ValueError, match=r"mask must have rank 2 .* or 4"):
        flash_attention(QUERY, KEY, VALUE, mask=mask)
    for function in (dot_product_attention, attention_fn):  # these two broadcast, as jax.nn and Flax do
        for narrow in (mask, mask[0], mask[0, 0], mask[0, 0, 0]):
            got = function(QUERY, KEY, VALUE, mask=narrow)
            wanted = flash_attention(QUERY, KEY, VALUE, mask=np.broadcast_to(narrow, (1, H, S, S)))
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("function", [jax_flash.flash_attention, jax_flash.flash_attention_varlen])
def test_options_are_keywords_and_unknown_ones_are_refused(function):
    x = jnp.zeros((2, 3, 1, 8))
    with pytest.raises(TypeError, match="positional argument"):
        function(x, x, x, None, None, True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_seqlen'"):
        function(x, x, x, max_seqlen=3)


@pytest.mark.parametrize("name", ["segment_ids", "q_lengths", "bias"])
def test_fixed_only_arguments_do_not_exist_for_packed_sequences(name):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        jax_flash.flash_attention_varlen(*[jnp.zeros((2, 1, 8))] * 3, jnp.zeros(2, jnp.int32), **{name: None})


@pytest.mark.parametrize(
    ("name", "x"), [("query", QUERY), ("kv_lengths", np.int32([3, 4])), ("mask", np.ones((S, S), bool))]
)
def test_a_reference_is_refused_by_the_name_of_its_argument(name, x):
    def attend(ref):
        return flash_attention(**dict(query=QUERY, key=KEY, value=VALUE) | {name: ref})

    message = re.escape(f"flash_attention: {name} must be an array, got a jax.Ref; read it with ref[...]")
    for call in (attend, jax.jit(attend)):
        with pytest.raises(TypeError, match=message):
            call(jax.new_ref(x))
