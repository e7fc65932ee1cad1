"""flash_attn's options as type checkers see them in the overloads, which differ in what a call returns."""

from __future__ import annotations

from typing import TypedDict

from ..options import ArrayLike, Implementation, IndexLike, LengthsLike, Number

WindowSize = tuple[int, int]


class FlashAttnOptions(TypedDict, total=False):
    """The options of `flash_attn_func` and the packed forms but `return_attn_probs`."""

    dropout_p: float
    softmax_scale: Number | None
    causal: bool
    window_size: WindowSize
    softcap: Number
    alibi_slopes: ArrayLike | None
    deterministic: bool
    dropout_key: ArrayLike | None
    implementation: Implementation | None


class FlashAttnVarlenOptions(FlashAttnOptions, total=False):
    """The options of `flash_attn_varlen_func` but `return_attn_probs`."""

    block_table: IndexLike | None


class KVCacheOptions(TypedDict, total=False):
    """The options of `flash_attn_with_kvcache` but `return_softmax_lse`."""

    cache_seqlens: LengthsLike | None
    cache_batch_idx: IndexLike | None
    cache_leftpad: IndexLike | None
    block_table: IndexLike | None
    softmax_scale: Number | None
    causal: bool
    window_size: WindowSize
    softcap: Number
    rotary_interleaved: bool
    alibi_slopes: ArrayLike | None
    num_splits: int
    implementation: Implementation | None
