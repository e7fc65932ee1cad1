"""The types of the public functions' arguments.

The typed dictionaries are the options as type checkers see them in the overloads. The dataclasses are the arguments of
a call in one frozen value, which the functions fill and the checks read. The functions' own signatures repeat the
options, for `help` and `inspect`, and their docstrings say what each means; tests/test_typing.py holds all three to the
same names, types and defaults.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import jax
import numpy as np
from numpy.typing import NDArray

from .masks import Mask

Align = Literal["bottom_right", "top_left"]
Implementation = Literal["cpu", "cuda", "xla"]
PageLayout = Literal["nhd", "hnd"]
Scaling = Literal["static", "dynamic"]
Order = Literal["contiguous", "zigzag"]
RingMode = Literal["ring", "all_to_all"]
Window = tuple[int | None, int | None]
ArrayLike = jax.Array | NDArray[Any]
Number = float | np.floating[Any] | np.integer[Any] | ArrayLike  # of known value, because it is compiled in
# int32 arrays of JAX, or integers on the host, of any type, whose values int32 holds.
IndexLike = ArrayLike | Sequence[int] | Sequence[Sequence[int]]
Scale = ArrayLike | float  # for float8 pools; one number is the scale of all heads
LengthsLike = ArrayLike | Sequence[int] | int  # one number is the length of all


class Options(TypedDict, total=False):
    """The options of every layout except for `return_lse` and `return_max`, in which the overloads differ."""

    causal: bool
    window: Window | None
    align: Align
    scale: Number | None
    softcap: Number | None
    alibi_slopes: ArrayLike | None
    sinks: ArrayLike | None
    deterministic: bool
    implementation: Implementation | None


class DenseOptions(Options, total=False):
    """The options of calls whose keys are arrays, not pages."""

    kv_lengths: LengthsLike | None
    dropout_rate: Number
    dropout_key: ArrayLike | None


class VarlenOptions(DenseOptions, total=False):
    """The options of `flash_attention_varlen`."""

    mask: Mask | None


class SequenceOptions(DenseOptions, total=False):
    """The options that `flash_attention` shares with `ring_attention`."""

    mask: ArrayLike | Mask | None
    segment_ids: ArrayLike | tuple[IndexLike, IndexLike] | None
    q_lengths: LengthsLike | None
    bias: ArrayLike | None
    bias_first: bool


class FixedOptions(SequenceOptions, total=False):
    """The options of `flash_attention`."""


class RingOptions(SequenceOptions, total=False):
    """The options of `ring_attention`."""

    order: Order
    mode: RingMode


class DotProductOptions(TypedDict, total=False):
    """The options of `dot_product_attention` except for `return_residual`, in which its overloads differ."""

    scale: Number | None
    is_causal: bool
    query_seq_lengths: IndexLike | None
    key_value_seq_lengths: IndexLike | None
    local_window_size: int | tuple[int, int] | None
    implementation: Implementation | None


class PagedOptions(Options, total=False):
    """The options of `paged_attention`."""

    cu_seqlens_q: IndexLike | None
    page_layout: PageLayout
    num_splits: int | None
    batch_invariant: bool
    k_scale: Scale | None
    v_scale: Scale | None
    mask: Mask | None
    draft_mask: ArrayLike | None
    value_dim: int | None
    value_start: int


class AppendOptions(TypedDict, total=False):
    """The options of `append_kv` except for `scale`, in which its overloads differ."""

    cu_seqlens: IndexLike | None
    page_layout: PageLayout
    rotary: tuple[ArrayLike, ArrayLike] | None
    interleaved: bool
    k_scale: Scale | None
    v_scale: Scale | None
    implementation: Implementation | None


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The arguments that every attention call has."""

    query: ArrayLike
    causal: bool = False
    window: Window | None = None
    align: Align = "bottom_right"
    scale: Number | None = None
    softcap: Number | None = None
    alibi_slopes: ArrayLike | None = None
    sinks: ArrayLike | None = None
    return_lse: bool = False
    return_max: bool = False
    deterministic: bool = False
    implementation: Implementation | None = None


@dataclass(frozen=True, kw_only=True)
class DenseArguments(Arguments):
    """The arguments of calls whose keys are arrays, not pages."""

    key: ArrayLike
    value: ArrayLike | None  # None: V is K
    kv_lengths: LengthsLike | None = None
    dropout_rate: Number = 0.0
    dropout_key: ArrayLike | None = None


@dataclass(frozen=True, kw_only=True)
class VarlenArguments(DenseArguments):
    """The arguments of `flash_attention_varlen`."""

    cu_seqlens_q: IndexLike
    cu_seqlens_k: IndexLike | None = None
    mask: Mask | None = None


@dataclass(frozen=True, kw_only=True)
class SequenceArguments(DenseArguments):
    """The arguments that `flash_attention` shares with `ring_attention`."""

    mask: ArrayLike | Mask | None = None
    segment_ids: ArrayLike | tuple[IndexLike, IndexLike] | None = None
    q_lengths: LengthsLike | None = None
    bias: ArrayLike | None = None
    bias_first: bool = False


@dataclass(frozen=True, kw_only=True)
class FixedArguments(SequenceArguments):
    """The arguments of `flash_attention`."""


@dataclass(frozen=True, kw_only=True)
class RingArguments(SequenceArguments):
    """The arguments of `ring_attention`."""

    axis_name: str | tuple[str, ...]
    order: Order = "contiguous"
    mode: RingMode = "ring"


@dataclass(frozen=True, kw_only=True)
class Pools:
    """The page pools of a call, and the tables and lengths that locate the sequences in them."""

    k_pages: ArrayLike
    v_pages: ArrayLike | None
    block_tables: IndexLike
    kv_lengths: LengthsLike
    page_layout: PageLayout = "nhd"
    k_scale: Scale | None = None
    v_scale: Scale | None = None
    implementation: Implementation | None = None


@dataclass(frozen=True, kw_only=True)
class PagedArguments(Pools, Arguments):
    """The arguments of `paged_attention`."""

    cu_seqlens_q: IndexLike | None = None
    num_splits: int | None = None
    batch_invariant: bool = False
    mask: Mask | None = None
    draft_mask: ArrayLike | None = None
    value_dim: int | None = None
    value_start: int = 0


@dataclass(frozen=True, kw_only=True)
class AppendArguments(Pools):
    """The arguments of `append_kv`."""

    key: ArrayLike
    value: ArrayLike | None
    cu_seqlens: IndexLike | None = None
    rotary: tuple[ArrayLike, ArrayLike] | None = None
    interleaved: bool = False
    scale: Scaling = "static"
