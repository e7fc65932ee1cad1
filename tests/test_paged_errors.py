"""Every error of paged_attention and append_kv: one sentence that names the argument, what was got, what is allowed."""

import jax
import jax.numpy as jnp
import pytest
from pages import FLOAT8, require
from test_append import arguments
from test_errors import floats

from jax_flash import append_kv, paged_attention

N, PAGES, SIZE, HQ, HK, D = 2, 3, 4, 4, 2, 8


def ints(*shape, dtype="int32"):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def pool(*shape, dtype="float32"):
    return dict.fromkeys(("k_pages", "v_pages"), floats(*shape, dtype=dtype))


EIGHT = pool(7, SIZE, HK, D, dtype=FLOAT8[1])
POOLS = dict(**pool(7, SIZE, HK, D), block_tables=ints(N, PAGES), kv_lengths=ints(N))
ATTENTION = dict(query=floats(N, 1, HQ, D), **POOLS)
APPEND = dict(key=floats(N, 3, HK, D), value=floats(N, 3, HK, D), **POOLS)

BOTH = [  # (what is wrong, exception, sentence)
    (dict(k_pages=None), TypeError, "k_pages must be an array, got None"),
    (dict(v_pages=floats(7, SIZE, HK, D, dtype=FLOAT8[0])), TypeError,
     "v_pages has dtype float8_e4m3fn, which differs from k_pages' float32"),
    (dict(v_pages=floats(8, SIZE, HK, D)), ValueError,
     "v_pages has shape (8, 4, 2, 8), which differs from k_pages' (7, 4, 2, 8) before the last dimension"),
    (dict(k_pages=floats(SIZE, HK, D)), ValueError, "k_pages must have rank 4 [p ps hk d], got shape (4, 2, 8)"),
    (pool(7, 0, HK, D), ValueError, "k_pages has page size 0, allowed are 1 and more"),
    (dict(block_tables=ints(N)), ValueError, "block_tables must have rank 2 [n pages], got shape (2,)"),
    (dict(block_tables=ints(1, PAGES)), ValueError, "block_tables has number of sequences 1, which differs from "),
    (dict(kv_lengths=ints(3)), ValueError, "kv_lengths must have shape [n] = (2,), got (3,)"),
    (dict(block_tables=ints(N, PAGES, dtype="int16")), TypeError, "block_tables must be int32, got int16"),
    (dict(kv_lengths=ints(N, dtype="uint8")), TypeError, "kv_lengths must be int32, got uint8"),
    (dict(page_layout="dhn"), ValueError, "page_layout must be one of ('nhd', 'hnd'), got 'dhn'"),
    (dict(k_scale=floats(HK)), ValueError,
     "k_scale must be None with pools of dtype float32; scales belong to float8"),
    (EIGHT | dict(v_scale=floats(3)), ValueError,
     "v_scale must be a number or have shape [hk] = (2,) or [p, hk] = (7, 2), got (3,)"),
    (EIGHT | dict(k_scale=floats(6, HK)), ValueError,
     "k_scale must be a number or have shape [hk] = (2,) or [p, hk] = (7, 2), got (6, 2)"),
    (EIGHT | dict(k_scale=floats(1, 1, 1)), ValueError, "or [p, hk] = (7, 2), got (1, 1, 1)"),
    (EIGHT | dict(k_scale=float("inf")), ValueError, "k_scale must be finite, got inf"),
    (EIGHT | dict(v_scale=0), ValueError, "v_scale must not be 0"),
    (EIGHT | dict(k_scale=floats(HK, dtype="bfloat16")), TypeError, "k_scale must be float32"),
    (dict(implementation="gpu"), ValueError, "implementation"),
    (dict(block_tables=None), TypeError, "block_tables must be an array, got None"),
    (dict(kv_lengths=2.0), TypeError, "kv_lengths must hold integers, got float64"),
]  # fmt: skip
OF_ATTENTION = [
    (dict(query=floats(3, HQ, D)), ValueError, "query must have rank 4 [n sq hq d], got shape (3, 4, 8)"),
    (dict(query=floats(N, 1, HQ, D, dtype="int8")), TypeError, "query has dtype int8, allowed are float16, "),
    (pool(7, SIZE, HK, D, dtype="bfloat16"), TypeError,
     "k_pages has dtype bfloat16, allowed are float32 (as query), float8_e4m3fn and float8_e5m2"),
    (pool(7, SIZE, HK, 16), ValueError, "k_pages has head dim 16"),
    (pool(7, SIZE, 3, D), ValueError, "which does not divide query's 4; page_layout='nhd' means [p, ps, hk, d], got"),
    (dict(block_tables=ints(3, PAGES), kv_lengths=ints(3)), ValueError, "block_tables has number of sequences 3"),
    (dict(query=floats(5, HQ, D), cu_seqlens_q=ints(4)), ValueError,
     "cu_seqlens_q must have shape [n+1] = (3,), got (4,)"),
    (dict(cu_seqlens_q=ints(3)), ValueError, "query must have rank 3 [tq hq d], got shape (2, 1, 4, 8)"),
    (dict(num_splits=0), ValueError, "num_splits must be an int from 1 to 2147483647 or None, got 0"),
    (dict(num_splits=True), ValueError, "num_splits must be an int from 1 to 2147483647 or None, got True"),
    (dict(num_splits=2**31), ValueError, "num_splits must be an int from 1 to 2147483647 or None, got 2147483648"),
    (dict(num_splits=2.0), ValueError, "num_splits must be an int from 1 to 2147483647 or None, got 2.0"),
    (dict(batch_invariant=1), TypeError, "batch_invariant must be True or False, got 1"),
    (dict(batch_invariant=True, implementation="xla"), NotImplementedError,
     'batch_invariant is True with implementation="xla", whose compiler orders sums by the shapes'),
    (dict(window=(-1, 0)), ValueError, "window's left must be ≥ 0"),
    (dict(alibi_slopes=floats(3, HQ)), ValueError, "alibi_slopes must broadcast to [n hq] = (2, 4), got shape (3, 4)"),
    (dict(sinks=floats(HK)), ValueError, "sinks must have shape"),
    (dict(sinks=floats(N, 2, HQ)), ValueError, "sinks must have shape [hq] = (4,) or [n sq hq] = (2, 1, 4), got"),
    (dict(return_lse="no"), TypeError, "return_lse must be True or False, got 'no'"),
    (dict(draft_mask=ints(N, 1, 1)), TypeError,
     "draft_mask must be boolean (True = sees the new token), got int32; cast it with .astype(bool)"),
    (dict(draft_mask=ints(1, 1, dtype=bool)), ValueError, "draft_mask must have rank 3 [n sq sq], got shape (1, 1)"),
    (dict(draft_mask=ints(N, 2, 2, dtype=bool)), ValueError,
     "draft_mask must have shape [n, sq, sq] with n = 2 or 1, sq = 1, got (2, 2, 2)"),
    (dict(draft_mask=ints(3, 1, 1, dtype=bool)), ValueError, "with n = 2 or 1, sq = 1, got (3, 1, 1)"),
    (dict(draft_mask=ints(N, 1, 1, dtype=bool), align="top_left"), ValueError,
     "align must be 'bottom_right' with draft_mask, whose tokens are the last keys, got 'top_left'"),
    (dict(query=floats(5, HQ, D), cu_seqlens_q=ints(N + 1), draft_mask=ints(N, 3, 4, dtype=bool)), ValueError,
     "draft_mask must have shape [n, s, s] with n = 2 or 1, got (2, 3, 4)"),
    (dict(query=floats(5, HQ, D), cu_seqlens_q=ints(N + 1), draft_mask=ints(N, 0, 0, dtype=bool)), ValueError,
     "draft_mask must have at least one row, got shape (2, 0, 0); leave it None"),
    (dict(query=floats(N, 1, HQ, 576)) | pool(7, SIZE, HK, 576), ValueError,
     'k_pages has head dim 576, allowed are 1 to 512; implementation="xla" takes any'),
    (dict(v_pages=floats(7, SIZE, HK, 520)), ValueError, "v_pages has head dim 520, allowed are 1 to 512;"),
    (dict(v_pages=None, value_dim=9), ValueError,
     "value_dim must be an int from 1 to 8, the columns of k_pages, with v_pages=None; got 9"),
    (dict(v_pages=None, value_dim=True), ValueError, "value_dim must be an int from 1 to 8"),
    (dict(value_dim=8), ValueError, "value_dim is 8, but v_pages is given; it belongs to v_pages=None"),
    (dict(k_pages=floats(7, SIZE, HK, D, dtype=FLOAT8[1]), v_pages=None, value_dim=4, v_scale=floats(HK)), ValueError,
     "v_scale must be None with v_pages=None and values that overlap the keys, where k_scale is the scale of both"),
    (dict(query=floats(N, 1, HQ, 648), k_pages=floats(7, SIZE, HK, 648), v_pages=None, value_dim=512), ValueError,
     'query has head dim 648, allowed are 1 to 640 with v_pages=None; implementation="xla" takes any'),
    (dict(query=floats(N, 1, HQ, 16), v_pages=None, value_dim=4), ValueError,
     "k_pages has head dim 8, which differs from query's 16"),
    (dict(value_start=8), ValueError, "value_start is 8, but v_pages is given; it belongs to v_pages=None"),
    (dict(v_pages=None, value_dim=4, value_start=5), ValueError,
     "value_start must be an int from 0 to 4, the columns of k_pages less value_dim, got 5"),
    (dict(v_pages=None, value_dim=4, value_start=-1), ValueError, "value_start must be an int from 0 to 4"),
    (dict(query=floats(N, 1, HQ, 520), k_pages=floats(7, SIZE, HK, 520), v_pages=None), ValueError,
     """value_dim is 520, as query's head dim, allowed are 1 to 512; implementation="xla" takes any"""),
    (dict(query=floats(N, 1, HQ, 576), k_pages=floats(7, SIZE, HK, 576), v_pages=None, value_dim=520), ValueError,
     'value_dim is 520, allowed are 1 to 512; implementation="xla" takes any'),
    (dict(query=floats(N, 1, HQ, 0)) | pool(7, SIZE, HK, 0), ValueError,
     "k_pages must have a static head dim of at least 1, got 0"),
]  # fmt: skip
STORED = dict.fromkeys(("key", "value"), floats(N, 3, HK, D, dtype=FLOAT8[1])) | pool(
    7, SIZE, HK, D, dtype=FLOAT8[1]
)
OF_APPEND = [
    (dict(key=floats(N, HK, D)), ValueError, "key must have rank 4 [n s hk d], got shape (2, 2, 8)"),
    (dict(key=floats(N, 3, HK, D, dtype="int8")), TypeError, "key has dtype int8, allowed are float16, "),
    (dict(value=floats(N, 3, HK, D, dtype="bfloat16")), TypeError,
     "value has dtype bfloat16, which differs from key's float32"),
    (dict(value=floats(N, 2, HK, D)), ValueError,
     "value has shape (2, 2, 2, 8), which differs from key's (2, 3, 2, 8) before the last dimension"),
    (dict(value=floats(N, 3, HK, 16)), ValueError, "v_pages has head dim 8"),
    (pool(7, SIZE, 4, D), ValueError, "key has head count 2"),
    (pool(7, SIZE, HK, D, dtype="bfloat16"), TypeError,
     "k_pages has dtype bfloat16, allowed are float32 (as key), float8_e4m3fn and float8_e5m2"),
    (dict(cu_seqlens=ints(3)), ValueError, "key must have rank 3 [t hk d], got shape (2, 3, 2, 8)"),
    (dict(key=floats(5, HK, D), value=floats(5, HK, D), cu_seqlens=ints(2)), ValueError,
     "cu_seqlens must have shape [n+1] = (3,), got (2,)"),
    (dict(rotary=floats(9, 4)), TypeError, "rotary must be a pair (cos, sin)"),
    (dict(rotary=(floats(9, 4), floats(9, 3))), ValueError, "sin must have shape"),
    (dict(rotary=(floats(9, 5), floats(9, 5))), ValueError,
     "cos has 5 columns, for 10 features; the head dim is 8"),
    (dict(rotary=(floats(0, 4), floats(0, 4))), ValueError, "cos must have at least one position, got 0"),
    (dict(scale="by page"), ValueError, "scale must be one of ('static', 'dynamic'), got 'by page'"),
    (dict(scale="dynamic"), ValueError,
     'scale="dynamic" is for float8 pools, got k_pages of dtype float32; use scale="static"'),
    (EIGHT | dict(scale="dynamic"), ValueError,
     'scale="dynamic" updates k_scale [p, hk] = (7, 2), got None; start with jnp.ones'),
    (EIGHT | dict(scale="dynamic", k_scale=floats(7, HK), v_scale=floats(HK)), ValueError,
     'scale="dynamic" updates v_scale [p, hk] = (7, 2), got shape (2,); start with jnp.ones'),
    (dict(interleaved=1), TypeError, "interleaved must be True or False, got 1"),
    (dict.fromkeys(("key", "value"), floats(N, 3, HK, 576)) | pool(7, SIZE, HK, 576), ValueError,
     'k_pages has head dim 576, allowed are 1 to 512; implementation="xla" takes any'),
    (dict(value=floats(N, 3, HK, 520), v_pages=floats(7, SIZE, HK, 520)), ValueError,
     "v_pages has head dim 520, allowed are 1 to 512;"),
    (dict(v_pages=None), ValueError, "value must be None with v_pages=None, where values are a part of key"),
    (dict(value=None), TypeError, "value must be an array, got None"),
    (dict(v_pages=None, value=None, v_scale=floats(HK)), ValueError, "v_scale must be None with v_pages=None"),
    (dict(key=floats(N, 3, HK, 1032), k_pages=floats(7, SIZE, HK, 1032), v_pages=None, value=None), ValueError,
     "k_pages has head dim 1032, allowed are 1 to 1024 with v_pages=None;"),
    (STORED | dict(rotary=(floats(9, 4), floats(9, 4))), ValueError,
     "rotary must be None with key of dtype float8_e5m2, which is stored as it is"),
    (STORED | dict(k_scale=floats(HK)), ValueError, "k_scale must be None with key of dtype float8_e5m2"),
    (STORED | dict(scale="dynamic"), ValueError, "scale must be 'static' with key of dtype float8_e5m2"),
    (STORED | pool(7, SIZE, HK, D, dtype="float8_e4m3fn"), TypeError,
     "k_pages has dtype float8_e4m3fn, which differs from key's float8_e5m2"),
    (STORED | dict(value=floats(N, 3, HK, D)), TypeError, "value has dtype float32, which differs from key's float8"),
]  # fmt: skip
ROWS = [
    *((paged_attention, ATTENTION, *row) for row in BOTH + OF_ATTENTION),
    *((append_kv, APPEND, *row) for row in BOTH + OF_APPEND),
]


@pytest.mark.parametrize(
    ("function", "right", "wrong", "error", "sentence"),
    ROWS,
    ids=[f"{r[0].__name__}-{r[4][:40]}" for r in ROWS],
)
def test_one_sentence_names_the_argument_and_what_is_allowed(function, right, wrong, error, sentence):
    given = right | wrong
    static = {
        n: x for n, x in given.items() if isinstance(x, (str, bool, int, float, type(None))) or n == "window"
    }
    arrays = {n: x for n, x in given.items() if n not in static}
    with pytest.raises(error) as caught:
        jax.eval_shape(lambda arrays: function(**arrays, **static), arrays)
    message = str(caught.value)
    assert message.startswith(f"{function.__name__}: ")
    assert sentence in message


def test_right_arguments_raise_nothing():
    assert jax.eval_shape(lambda x: paged_attention(**x), ATTENTION).shape == (N, 1, HQ, D)
    assert jax.eval_shape(lambda x: append_kv(**x), APPEND)[2].shape == (N,)


def test_plain_jax_takes_any_head_dim():
    wide = floats(N, 1, HQ, 576)
    pools = pool(7, SIZE, HK, 576) | {n: POOLS[n] for n in ("block_tables", "kv_lengths")}
    new = dict.fromkeys(("key", "value"), floats(N, 3, HK, 576))
    assert (
        jax.eval_shape(lambda x: paged_attention(**x, implementation="xla"), pools | {"query": wide}) == wide
    )
    assert jax.eval_shape(lambda x: append_kv(**x, implementation="xla"), pools | new)[0] == pools["k_pages"]


def test_append_is_not_differentiable(kernel):
    require(kernel)
    call = arguments()

    def loss(key):
        return append_kv(**call | {"key": key}, implementation=kernel)[0].sum()

    with pytest.raises(NotImplementedError, match="append"):
        jax.grad(loss)(call["key"])
