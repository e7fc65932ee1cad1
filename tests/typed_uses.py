"""The types that users see. mypy --strict reads this file (tests/test_typing.py); nothing runs it.

A line with `type: ignore` must be an error of that kind, because mypy reports an ignore that is not needed.
"""

from functools import partial
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jax_flash
from jax_flash import (
    append_kv,
    apply_rotary,
    dot_product_attention,
    flash_attention,
    flash_attention_varlen,
    merge_attention,
    paged_attention,
    ring_attention,
)
from jax_flash.compat.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from jax_flash.options import FixedOptions

q = k = v = jnp.ones((2, 8, 4, 64))
packed = jnp.ones((16, 4, 64))
pool = jnp.ones((4, 16, 4, 64))
tables = jnp.zeros((2, 2), jnp.int32)
lengths = jnp.array([3, 5], jnp.int32)
with_lse = with_max = bool(q.size)

# The result type depends on return_lse and return_max.
assert_type(flash_attention(q, k, v), Array)
assert_type(flash_attention(q, k, v, causal=True, return_lse=False), Array)
assert_type(flash_attention(q, k, v, causal=True, return_lse=True), tuple[Array, Array])
assert_type(flash_attention(q, k, v, return_lse=with_lse), Array | tuple[Array, Array])
assert_type(flash_attention(q, k, v, return_max=True), tuple[Array, Array])
assert_type(flash_attention(q, k, v, return_lse=True, return_max=True), tuple[Array, Array, Array])
assert_type(flash_attention(q, k, v, return_lse=True, return_max=False), tuple[Array, Array])
assert_type(
    flash_attention(q, k, v, return_lse=with_lse, return_max=with_max),
    Array | tuple[Array, Array] | tuple[Array, Array, Array],
)
assert_type(flash_attention_varlen(packed, packed, packed, lengths, return_max=True), tuple[Array, Array])
assert_type(paged_attention(q, pool, pool, tables, lengths, return_max=True), tuple[Array, Array])
assert_type(flash_attention_varlen(packed, packed, packed, lengths), Array)
assert_type(flash_attention_varlen(packed, packed, packed, lengths, return_lse=True), tuple[Array, Array])
assert_type(
    flash_attention_varlen(packed, packed, packed, lengths, return_lse=with_lse), Array | tuple[Array, Array]
)
assert_type(paged_attention(q, pool, pool, tables, lengths, causal=True), Array)
assert_type(paged_attention(q, pool, pool, tables, lengths, return_lse=True), tuple[Array, Array])
assert_type(paged_attention(q, pool, pool, tables, 7, return_lse=with_lse), Array | tuple[Array, Array])
assert_type(dot_product_attention(q, k, v, is_causal=True), Array)
assert_type(dot_product_attention(q, k, v, return_residual=True), tuple[Array, Array])
assert_type(dot_product_attention(q, k, v, return_residual=with_lse), Array | tuple[Array, Array])
assert_type(append_kv(pool, pool, k, v, tables, lengths), tuple[Array, Array, Array])
assert_type(append_kv(pool, None, k, None, tables, lengths), tuple[Array, None, Array])
assert_type(paged_attention(q, pool, None, tables, lengths, value_dim=32), Array)
assert_type(
    append_kv(pool, pool, k, v, tables, lengths, k_scale=q, v_scale=q, scale="dynamic"),
    tuple[Array, Array, Array, Array, Array],
)
assert_type(apply_rotary(q, [0, 1], np.ones((9, 32)), np.ones((9, 32))), Array)
assert_type(merge_attention([q, np.ones(3)], [q, q]), tuple[Array, Array])
assert_type(jax_flash.backends(), list[jax_flash.Backend])

# NumPy arrays, lists and numbers, as they are taken at run time.
h = np.ones((2, 8, 4, 64), np.float32)
flash_attention(h, h, h, mask=np.ones((8, 8), bool), bias=np.zeros((8, 8)), kv_lengths=np.array([3, 5]))
flash_attention(h, h, h, q_lengths=[3, 5], kv_lengths=7, segment_ids=np.zeros((2, 8), np.int32))
flash_attention(h, h, h, segment_ids=([[0, 0], [0, 1]], np.zeros((2, 8))))
flash_attention_varlen(h[0], h[0], h[0], [0, 3, 8], np.cumsum([0, 3, 5]), kv_lengths=[3, 5])
paged_attention(h, h, h, [[0, 1], [2, 3]], [3, 5], page_layout="hnd", num_splits=2, k_scale=np.ones(4))
paged_attention(h, h, h, [[0, 1], [2, 3]], 5, draft_mask=np.ones((2, 8, 8), bool))
append_kv(h, h, h, h, [[0], [1]], 3, rotary=(np.ones((9, 32)), np.ones((9, 32))), page_layout="hnd")

# Options are checked by name and by value.
flash_attention(q, k, v, window=(128, 0), align="top_left", implementation="xla", scale=1, softcap=30)
flash_attention(q, k, v, scale=np.float32(2), softcap=jnp.float32(30), dropout_rate=np.array(0.1))
dot_product_attention(q, k, v, scale=jnp.float32(2))
flash_attn_func(q, k, v, softmax_scale=np.float32(2), softcap=np.int32(30))
flash_attention(q, k, v, align="bottom")  # type: ignore[call-overload]
flash_attention(q, k, v, implementation="cudnn")  # type: ignore[call-overload]
flash_attention(q, k, v, return_lse="no")  # type: ignore[call-overload]
flash_attention(q, k, v, casual=True)  # type: ignore[call-overload]
flash_attention(q, k, v, window=128)  # type: ignore[call-overload]
flash_attention(q, k, v, None)  # type: ignore[call-overload]
flash_attention_varlen(packed, packed, packed, lengths, mask=q)  # type: ignore[call-overload]
paged_attention(q, pool, pool, tables, lengths, page_layout="dhn")  # type: ignore[call-overload]
append_kv(pool, pool, k, v, tables, lengths, page_layout="dhn")  # type: ignore[call-overload]
append_kv(pool, pool, k, v, tables, lengths, scale="by page")  # type: ignore[call-overload]
dot_product_attention(q, k, v, causal=True)  # type: ignore[call-overload]

# Options from a dict: a TypedDict is checked. For other dicts mypy knows one type for all values.
of_one_type, of_several = {"causal": True}, {"causal": True, "window": (128, 0), "scale": 0.5}
of_any_type: dict[str, Any] = {"return_lse": True}
typed: FixedOptions = {"causal": True, "window": (128, 0)}
assert_type(flash_attention(q, k, v, **of_one_type), Any)
assert_type(flash_attention(q, k, v, deterministic=True, **of_several), Any)
assert_type(flash_attention(q, k, v, **of_any_type), Any)
assert_type(flash_attention(q, k, v, **typed), Array)
assert_type(flash_attention(q, k, v, return_lse=True, **typed), tuple[Array, Array])
flash_attention_varlen(packed, packed, packed, lengths, **of_several)
ring_attention(q, k, v, axis_name="sequence", **of_several)
paged_attention(q, pool, pool, tables, lengths, **of_several)
append_kv(pool, pool, k, v, tables, lengths, **{"interleaved": True})
dot_product_attention(q, k, v, **{"is_causal": True, "local_window_size": (3, 0)})
flash_attn_func(q, k, v, **of_one_type)
flash_attn_varlen_func(packed, packed, packed, lengths, lengths, 7, 7, **of_one_type)
flash_attn_qkvpacked_func(packed, **of_one_type)
flash_attn_kvpacked_func(q, h, **of_one_type)
flash_attn_varlen_qkvpacked_func(packed, [0, 16], 16, **of_one_type)
flash_attn_varlen_kvpacked_func(packed, packed, [0, 16], [0, 16], 16, 16, **of_one_type)
flash_attn_with_kvcache(q, k, v, **of_one_type)

# flash_attn's functions.
assert_type(flash_attn_func(q, k, v, causal=True), Array)
assert_type(flash_attn_func(q, k, v, return_attn_probs=True), tuple[Array, Array, None])
assert_type(flash_attn_func(q, k, v, 0.0, None, True, (256, 0)), Any)
assert_type(flash_attn_varlen_func(packed, packed, packed, lengths, lengths, 7, 7), Array)
assert_type(flash_attn_qkvpacked_func(jnp.stack([q, k, v], 2), softcap=30.0), Array)
assert_type(flash_attn_kvpacked_func(q, h, return_attn_probs=True), tuple[Array, Array, None])
assert_type(flash_attn_varlen_qkvpacked_func(packed, [0, 16], 16), Array)
assert_type(flash_attn_varlen_kvpacked_func(packed, packed, [0, 16], [0, 16], 16, 16), Array)
assert_type(flash_attn_with_kvcache(q, k, v, k, v, cache_seqlens=3), tuple[Array, Array, Array])
assert_type(flash_attn_with_kvcache(q, k, v, return_softmax_lse=True), tuple[Array, Array, Array, Array])
flash_attn_func(q, k, v, window=(256, 0))  # type: ignore[call-overload]

# Under JAX's transformations.
step = jax.jit(partial(flash_attention, causal=True))
step(q, k, v)
jax.grad(lambda q: flash_attention(q, k, v).sum())(q)
jax.vmap(lambda q: flash_attention(q, k[0], v[0]))(q[None])
