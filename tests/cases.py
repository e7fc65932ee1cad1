"""Named cases, shared by the tests and the benchmarks: shapes, options, and random operands from a seed."""

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
    forms: tuple[str, ...] = ()  # of tests/forms.py: the mask is a value, which all of these leave
    form_seed: int = 0
    bias: tuple[int, ...] | None = None
    bias_dtype: str = "float32"
    alibi_slopes: tuple[int, ...] | None = None
    sinks: bool | str = False  # True: one for each head; "token": for each head of each token
    draft_mask: tuple[int, ...] | None = None  # the shape; of paged calls
    shared_kv: bool = False  # V is K: the argument value is None, and its gradient is a part of the key's

    def replace(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)

    @property
    def options(self) -> dict[str, Any]:
        """The Python options of the public call."""
        return {name: getattr(self, name) for name in OPTIONS}


def varlen(name: str, q_sequences: tuple[int, ...], **options: Any) -> Case:
    return Case(name, layout="varlen", q_sequences=q_sequences, **options)


@dataclass(frozen=True)
class Inputs:
    """The arrays of a public call, and cotangents for its results."""

    positional: dict[str, Any]  # query key value [cu_seqlens_q cu_seqlens_k], in call order
    keywords: dict[str, Any]
    dout: jax.Array
    dlse: jax.Array  # finite everywhere, also where lse is −inf
    mask: dict[str, Any] = field(default_factory=dict)  # what a mask that is a value shows, as an operand


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
    """The dimensions in front of the heads, of query and of key."""
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
    """The query rows and the keys in use: `[b, s]` each, or `[t]`."""
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
        dropout_rate=case.dropout_rate,
        operands=tuple(name for name in OPTIONAL if name in operands(inputs)),
        value_dim=case.d if case.shared_kv else 0,
    )


FIXED = (
    Case("plain"),
    Case("one head of each", hq=3, hk=3),
    Case("one KV head", hq=4, hk=1),
    Case("dv differs", d=24, dv=8),
    Case("odd head dims", d=13, dv=7),
    Case("head dim 512", d=512, dv=512, causal=True, window=(9, None), sk=17, kv_lengths=(17, 5), sinks=True),
    Case("V is K", sq=19, causal=True, shared_kv=True, scale=-0.3),
    Case(
        "V is K, every option",
        sq=19,
        hk=1,
        shared_kv=True,
        softcap=2.0,
        bias=(2, 1, 19, 12),
        sinks=True,
        dropout_rate=0.2,
        q_lengths=(19, 7),
        kv_lengths=(12, 9),
        window=(9, 3),
        d=40,
        dv=40,
    ),
    Case(
        "head dims 320 and 507", d=320, dv=507, bias=(2, 1, 12, 12), softcap=3.0, segments=2, dropout_rate=0.2
    ),
    Case("ragged tiles", sq=33, sk=65),
    Case("causal", causal=True),
    Case("causal, more keys", causal=True, sk=19),
    Case("causal, more queries", causal=True, sq=19),
    Case("causal top left, more keys", causal=True, align="top_left", sk=19),
    Case("causal top left, more queries", causal=True, align="top_left", sq=19),
    Case("window", window=(3, 2)),
    Case("window, left only", window=(3, None), sk=17),
    Case("window, right only", window=(None, 4), sq=17),
    Case("window of one key", window=(0, 0), sk=15),
    Case("causal window", causal=True, window=(4, 0), sq=16, sk=21),
    Case("causal window top left", causal=True, window=(4, None), align="top_left", sq=16, sk=21),
    Case("window that misses", window=(2, 0), align="top_left", sq=21, sk=9),
    Case("boolean mask", mask=(2, 4, 12, 12)),
    Case("mask of keys", mask=(2, 1, 1, 12)),
    Case("mask per head", mask=(1, 4, 1, 1)),
    Case("segments", segments=3, sk=17),
    Case("lengths", q_lengths=(12, 5), kv_lengths=(7, 0)),
    Case("causal lengths", causal=True, q_lengths=(9, 5), kv_lengths=(4, 11)),
    Case("causal lengths top left", causal=True, align="top_left", q_lengths=(9, 5), kv_lengths=(4, 11)),
    Case("lengths out of range", q_lengths=(-3, 99), kv_lengths=(99, 6)),
    Case("scale", scale=0.7),
    Case("softcap", softcap=2.0),
    Case("bias", bias=(2, 4, 12, 12)),
    Case("bias of keys", bias=(2, 1, 1, 13), sk=13),
    Case("bias per head", bias=(4, 12, 1)),
    Case("bias in bfloat16", bias=(1, 4, 12, 12), bias_dtype="bfloat16"),
    Case("alibi", alibi_slopes=(4,), causal=True, sk=17),
    Case("alibi per entry", alibi_slopes=(2, 4), align="top_left", sq=17),
    Case("sinks", sinks=True, causal=True, sq=15),
    Case("sinks and lengths", sinks=True, q_lengths=(12, 5), kv_lengths=(7, 0)),
    Case("sinks by token", sinks="token", q_lengths=(12, 5), kv_lengths=(7, 0)),
    Case("dropout", dropout_rate=0.3),
    Case("dropout, causal", dropout_rate=0.5, causal=True, sq=17, sk=35),
    Case(
        "everything",
        sq=18,
        sk=27,
        causal=True,
        window=(11, None),
        softcap=4.0,
        mask=(1, 4, 1, 27),
        bias=(2, 1, 18, 27),
        segments=2,
        q_lengths=(18, 14),
        kv_lengths=(20, 27),
        alibi_slopes=(2, 4),
        sinks=True,
        dropout_rate=0.2,
    ),
)

_PAIRS = (("spans", "segments"), ("band", "ranges"), ("causal", "dense"))
FORMS = (
    *(
        Case(f"masks: {', '.join(names)}", forms=names, form_seed=7 * number, sq=40, sk=50)
        for number, names in enumerate([*((name,) for name in forms.FORMS), *_PAIRS])
    ),
    Case("masks with everything", sq=18, sk=27, causal=True, window=(11, None), softcap=4.0, bias=(2, 1, 18, 27),
         segments=2, q_lengths=(18, 14), kv_lengths=(20, 27), alibi_slopes=(2, 4), sinks=True, dropout_rate=0.2,
         forms=("prefix", "first", "segments")),
    Case("masks, tiles", b=1, sq=300, sk=700, hq=2, hk=1, forms=("first", "window"), form_seed=3),
    Case("masks, decode", sq=2, sk=300, forms=("ranges",)),
    Case("blocks, tiles", b=1, sq=300, sk=700, hq=2, hk=1, forms=("blocks",), form_seed=1),
    Case("blocks, decode", sq=2, sk=300, forms=("blocks",), causal=True),
    Case("blocks and a bias, lengths", sq=70, sk=90, q_lengths=(70, 50), kv_lengths=(90, 40), bias=(1, 4, 70, 90),
         forms=("blocks", "prefix"), form_seed=5, segments=2),
)  # fmt: skip

VARLEN = (
    varlen("packed", (5, 9, 1)),
    varlen("packed, one sequence", (13,)),
    varlen("packed, empty sequences", (0, 5, 0, 0, 7, 0)),
    varlen("packed, padding", (5, 6), padding=(4, 2)),
    varlen("packed, head dim 512", (5, 0, 6), d=512, dv=320, causal=True, padding=(1, 2), sinks=True),
    varlen(
        "packed, V is K",
        (5, 0, 6),
        k_sequences=(9, 3, 2),
        d=13,
        dv=13,
        causal=True,
        padding=(1, 2),
        shared_kv=True,
    ),
    varlen("packed, other keys", (5, 0, 6), k_sequences=(9, 3, 2)),
    varlen("packed, keys missing", (5, 3, 6), k_sequences=(9, 0, 2)),
    varlen("packed causal", (5, 9, 1), causal=True),
    varlen("packed causal, other keys", (5, 3, 6), k_sequences=(9, 4, 2), causal=True),
    varlen("packed causal top left", (5, 3, 6), k_sequences=(9, 4, 2), causal=True, align="top_left"),
    varlen("packed window", (9, 3, 6), k_sequences=(12, 4, 2), window=(2, 1)),
    varlen("packed kv_lengths", (5, 9, 1), kv_lengths=(3, 0, 9), padding=(1, 3)),
    varlen("packed causal kv_lengths", (5, 9, 1), kv_lengths=(3, 7, 9), causal=True),
    varlen("packed softcap", (5, 9), softcap=2.0, scale=0.5),
    varlen("packed alibi", (5, 9), k_sequences=(7, 12), alibi_slopes=(4,), causal=True),
    varlen("packed alibi per sequence", (5, 9), alibi_slopes=(2, 4)),
    varlen("packed sinks", (5, 9), sinks=True, kv_lengths=(0, 6), padding=(2, 2)),
    varlen("packed sinks by token", (5, 3, 9), sinks="token", kv_lengths=(5, 0, 6), padding=(2, 2)),
    varlen("packed dropout", (5, 19), dropout_rate=0.3),
    varlen("packed masks", (9, 0, 40), k_sequences=(12, 2, 60), padding=(3, 1), forms=("spans", "window")),
    varlen(
        "packed blocks", (9, 0, 40, 70), k_sequences=(12, 2, 60, 90), causal=True, forms=("blocks",), hq=2
    ),
    varlen(
        "packed positions",
        (9, 0, 40),
        k_sequences=(12, 2, 60),
        padding=(3, 4),
        forms=("positions", "segments"),
        kv_lengths=(12, 2, 50),
    ),
    varlen("packed ranges", (9, 0, 40), k_sequences=(12, 2, 60), causal=True, forms=("ranges",), sinks=True),
    varlen(
        "packed everything",
        (9, 0, 14),
        k_sequences=(12, 2, 11),
        padding=(3, 1),
        causal=True,
        window=(8, None),
        softcap=4.0,
        kv_lengths=(10, 1, 11),
        alibi_slopes=(3, 4),
        sinks=True,
        dropout_rate=0.2,
    ),
)

# The numbers of queries, and of keys that a row sees, decide which tiles the Hopper forward takes. test_plan_hopper.py
# asserts that these cases reach all of them. Elsewhere they are merely large.
FIXED_TILES = (
    Case("many queries", sq=200, sk=170, d=128, dv=128, hq=34, hk=2, b=1),
    Case("many queries, causal", causal=True, sq=300, sk=290, d=64, dv=64, hq=28, hk=4, b=1),
    Case("few queries", sq=150, sk=170, d=64, dv=64, hq=2, hk=1, b=1, causal=True),
    Case("many queries, d64", sq=190, sk=330, d=64, dv=64, hq=68, hk=4, b=1),
    Case("many queries, few waves", sq=300, sk=330, d=64, dv=64, hq=28, hk=4, b=1),
    Case("more keys, causal", causal=True, sq=190, sk=1130, d=64, dv=64, hq=68, hk=4, b=1),
    Case("more tiles than teams", causal=True, sq=140, sk=140, d=64, dv=64, hq=136, hk=4, b=1),
    Case("more tiles than teams, equally long", sq=128, sk=100, d=64, dv=64, hq=272, hk=4, b=1),
    Case("more tiles than blocks, equally long", sq=192, sk=300, d=64, dv=64, hq=140, hk=4, b=1),
    Case("more tiles than blocks, causal", causal=True, sq=200, sk=290, d=32, dv=32, hq=70, hk=2, b=1),
    Case("more tiles than blocks, window", window=(40, 40), sq=300, sk=300, d=128, dv=128, hq=48, hk=2, b=1),
    Case(
        "more tiles than blocks, window, d32", window=(40, 40), sq=400, sk=400, d=32, dv=32, hq=48, hk=2, b=1
    ),
    Case(
        "more tiles than blocks, lengths", kv_lengths=(270,), sq=192, sk=300, d=64, dv=64, hq=140, hk=4, b=1
    ),
    Case("more tiles than teams, window", window=(40, 40), sq=400, sk=400, d=64, dv=64, hq=68, hk=4, b=1),
    Case("few queries, many keys", sq=150, sk=1705, d=128, dv=128, hq=2, hk=1, b=1),
    Case("many keys", sq=70, sk=1705, d=128, dv=128, hq=68, hk=2, b=1),
    Case("many keys, causal", causal=True, sq=100, sk=1999, d=120, dv=104, hq=68, hk=4, b=1, sinks="token"),
    Case("many keys, two tiles of queries", sq=250, sk=4111, d=256, dv=248, hq=2, hk=1, b=1, causal=True),
    Case(
        "many keys, window",
        window=(1600, 3),
        sq=300,
        sk=1800,
        d=128,
        dv=128,
        hq=28,
        hk=1,
        b=1,
        kv_lengths=(1750,),
    ),
)
VARLEN_TILES = (
    varlen("packed, many keys", (130, 70), k_sequences=(2001, 1601), causal=True, d=128, dv=128, hq=34, hk=2),
    varlen("packed, many queries", (150, 90, 60), causal=True, d=64, dv=64, hq=28, hk=4),
    varlen("packed, many queries, all keys", (270, 390), d=64, dv=64, hq=14, hk=2),
    varlen("packed, more tiles than blocks", (270, 390), d=64, dv=64, hq=40, hk=2),
    varlen("packed, more tiles than teams", (270, 390), causal=True, d=64, dv=64, hq=40, hk=2),
)

CASES = FIXED + FORMS + VARLEN + FIXED_TILES + VARLEN_TILES
BY_NAME = {case.name: case for case in CASES}
