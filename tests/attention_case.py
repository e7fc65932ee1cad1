"""One attention problem, for the tests and the benchmarks: shapes, options, and random operands from a seed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import forms
import jax
import jax.numpy as jnp
import numpy as np

from jax_flash.operands import OPTIONAL
from jax_flash.spec import UNLIMITED, AttentionSpec

OPTIONS = ("causal", "window", "align", "scale", "softcap", "dropout_rate")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Case:
    """One attention problem. `mask`, `bias` and `alibi_slopes` are shapes; lengths are values.

    A varlen case has `q_sequences` (and `k_sequences`, if they differ) instead of b, sq and sk, and may
    have `padding` tokens after the last sequence, in query and key.
    """

    name: str
    layout: str = "fixed"
    b: int = 2
    sq: int = 12
    sk: int = 12
    hq: int = 4
    hk: int = 2
    d: int = 16
    dv: int = 16
    dtype: str = "float32"
    q_sequences: tuple[int, ...] = ()
    k_sequences: tuple[int, ...] | None = None
    padding: tuple[int, int] = (0, 0)
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    align: str = "bottom_right"
    scale: float | None = None
    softcap: float | None = None
    dropout_rate: float = 0.0
    q_lengths: tuple[int, ...] | None = None
    kv_lengths: tuple[int, ...] | None = None
    segments: int = 0
    mask: tuple[int, ...] | None = None
    forms: tuple[str, ...] = ()  # names of masks in tests/forms.py, which `&` combines
    form_seed: int = 0
    bias: tuple[int, ...] | None = None
    bias_dtype: str = "float32"
    bias_first: bool = False
    alibi_slopes: tuple[int, ...] | None = None
    sinks: bool | str = False  # True: one for each head; "token": for each head of each token
    draft_mask: tuple[int, ...] | None = None  # its shape; only paged calls have it
    shared_kv: bool = False  # V is K: the argument value is None, and its gradient is a part of the key's

    def replace(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)

    @property
    def options(self) -> dict[str, Any]:
        """The Python options of the public call."""
        options = {name: getattr(self, name) for name in OPTIONS}
        # Only fixed calls have this option.
        return options | {"bias_first": True} if self.bias_first else options


def varlen(name: str, q_sequences: tuple[int, ...], **options: Any) -> Case:
    return Case(name, layout="varlen", q_sequences=q_sequences, **options)


@dataclass(frozen=True)
class Inputs:
    """The arrays of a public call, and cotangents for its results."""

    positional: dict[str, Any]  # query key value [cu_seqlens_q cu_seqlens_k], in call order
    keywords: dict[str, Any]
    dout: jax.Array
    dlse: jax.Array  # finite everywhere, also where lse is −inf
    mask: dict[str, Any] = field(default_factory=dict)  # the oracle's operand for a mask of jax_flash.masks


def make_inputs(case: Case, seed: int = 0, on_device: bool = False) -> Inputs:
    """Random operands of `case`, the same for the same seed. `on_device` draws them on the device, which is faster."""
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(case.dtype)

    def normal(shape: tuple[int, ...], dtype: Any = dtype) -> jax.Array:
        if on_device:
            return jax.random.normal(jax.random.key(rng.integers(1 << 31), impl="rbg"), shape, dtype)
        return jax.device_put(rng.standard_normal(shape).astype(dtype))

    rows, columns = token_dims(case)
    positional = {
        "query": normal((*rows, case.hq, case.d)),
        "key": normal((*columns, case.hk, case.d)),
        "value": None if case.shared_kv else normal((*columns, case.hk, case.dv)),
    }
    if case.layout == "varlen":
        k_sequences = case.q_sequences if case.k_sequences is None else case.k_sequences
        positional |= {"cu_seqlens_q": cu_seqlens(case.q_sequences), "cu_seqlens_k": cu_seqlens(k_sequences)}
    keywords: dict[str, Any] = {}
    for name in ("q_lengths", "kv_lengths"):
        if getattr(case, name) is not None:
            keywords[name] = jnp.asarray(getattr(case, name), jnp.int32)
    if case.segments:
        keywords["segment_ids"] = tuple(
            jnp.asarray(np.sort(rng.integers(0, case.segments, size)), jnp.int32)
            for size in ((case.b, case.sq), (case.b, case.sk))
        )
    if case.mask is not None:
        keywords["mask"] = jnp.asarray(rng.random(case.mask) < 0.7)
    shown: dict[str, Any] = {}
    if case.forms:
        keywords["mask"], shown = forms.of_case(case)
    if case.draft_mask is not None:
        keywords["draft_mask"] = jnp.asarray(rng.random(case.draft_mask) < 0.5)
    if case.bias is not None:
        keywords["bias"] = normal(case.bias, jnp.dtype(case.bias_dtype))
    if case.alibi_slopes is not None:
        keywords["alibi_slopes"] = jnp.asarray(rng.uniform(0.05, 0.5, case.alibi_slopes), jnp.float32)
    if case.sinks:
        tokens = rows if case.sinks == "token" else ()
        keywords["sinks"] = normal((*tokens, case.hq), jnp.float32)
    if case.dropout_rate:
        keywords["dropout_key"] = jax.random.key(seed + 1)
    lse_shape = (*rows[:-1], case.hq, rows[-1])
    return Inputs(
        positional, keywords, normal((*rows, case.hq, case.dv)), normal(lse_shape, jnp.float32), shown
    )


def token_dims(case: Case) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The dimensions of query, and of key, that precede the heads."""
    if case.layout == "fixed":
        return (case.b, case.sq), (case.b, case.sk)
    k_sequences = case.q_sequences if case.k_sequences is None else case.k_sequences
    return (sum(case.q_sequences) + case.padding[0],), (sum(k_sequences) + case.padding[1],)


def cu_seqlens(lengths: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(np.concatenate([[0], np.cumsum(lengths)]), jnp.int32)


def operands(inputs: Inputs) -> dict[str, jax.Array]:
    """The operands of csrc/operands.def, made without the library's own validation."""
    made = dict(inputs.positional)
    if made["value"] is None:
        made["value"] = made["key"]
    for name, x in inputs.keywords.items():
        if name == "segment_ids":
            made["q_segment_ids"], made["kv_segment_ids"] = x
        elif name == "dropout_key":
            made["dropout"] = jnp.concatenate([jax.random.key_data(x), jnp.zeros(4, jnp.uint32)])
        elif name == "mask" and inputs.mask:
            made |= inputs.mask
        elif name in ("mask", "bias", "alibi_slopes"):
            made[name] = _with_rank(x, 2 if name == "alibi_slopes" else 4)
        elif name == "sinks":
            made[name] = _with_rank(x, made["query"].ndim - 1)
        else:
            made[name] = x
    return made


def _with_rank(x: jax.Array, rank: int) -> jax.Array:
    return x.reshape((1,) * (rank - x.ndim) + x.shape)


def poisoned(case: Case, inputs: Inputs) -> Inputs:
    """The same inputs with NaN in everything that the contract says is never read."""
    row_used, column_used = used(case)
    positional = dict(inputs.positional)
    positional["query"] = _poison(positional["query"], ~row_used[..., None, None])
    positional["key"] = _poison(positional["key"], ~column_used[..., None, None])
    if not case.shared_kv:
        positional["value"] = _poison(positional["value"], ~column_used[..., None, None])
    keywords = dict(inputs.keywords)
    if "bias" in keywords:
        unread = ~(row_used[:, None, :, None] & column_used[:, None, None, :])
        for axis, size in enumerate((1,) * (4 - keywords["bias"].ndim) + keywords["bias"].shape):
            unread = unread.all(axis, keepdims=True) if size == 1 else unread
        keywords["bias"] = _poison(keywords["bias"], unread)
    if case.sinks == "token":
        keywords["sinks"] = _poison(keywords["sinks"], ~row_used[..., None])
    lse_unused = ~np.expand_dims(row_used, -2)
    dout = _poison(inputs.dout, ~row_used[..., None, None])
    return Inputs(positional, keywords, dout, _poison(inputs.dlse, lse_unused), inputs.mask)


def used(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Which query rows and which keys are in use: two boolean arrays `[b, s]`, or `[t]` if packed."""
    rows, columns = token_dims(case)
    if case.layout == "fixed":
        return tuple(  # type: ignore[return-value]
            np.arange(s) < np.full(b, s if lengths is None else lengths).reshape(b, 1)
            for (b, s), lengths in ((rows, case.q_lengths), (columns, case.kv_lengths))
        )
    k_sequences = case.q_sequences if case.k_sequences is None else case.k_sequences
    row_used = np.arange(rows[0]) < sum(case.q_sequences)
    column_used = np.zeros(columns, bool)
    for z, start in enumerate(np.concatenate([[0], np.cumsum(k_sequences)])[:-1]):
        length = k_sequences[z] if case.kv_lengths is None else min(k_sequences[z], case.kv_lengths[z])
        column_used[start : start + length] = True
    return row_used, column_used


def _poison(x: jax.Array, where: np.ndarray) -> jax.Array:
    where = where.reshape(where.shape[where.ndim - x.ndim :]) if where.ndim > x.ndim else where
    return jnp.asarray(np.where(where, np.asarray(np.nan, x.dtype), np.asarray(x)))


def spec(case: Case, inputs: Inputs) -> AttentionSpec:
    """The AttentionSpec of a case, made without the library's own validation."""
    left, right = (UNLIMITED if side is None else side for side in case.window or (None, None))
    return AttentionSpec(
        layout=case.layout,
        left=left,
        right=0 if case.causal else right,
        align=case.align,
        scale=case.d**-0.5 if case.scale is None else case.scale,
        softcap=case.softcap or 0.0,
        bias_first=case.bias_first and bool(case.softcap) and case.bias is not None,
        dropout_rate=round(case.dropout_rate * 32768) / 32768,
        operands=tuple(name for name in OPTIONAL if name in operands(inputs)),
        value_dim=case.d if case.shared_kv else 0,
    )
