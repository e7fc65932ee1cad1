"""What is measured: the tests' cases at shapes where speed matters, and the arithmetic that they take."""

from __future__ import annotations

import numpy as np

from tests.cases import Case, Inputs, make_inputs, varlen

__all__ = ["CPU", "GPU", "Case", "Inputs", "flop", "make_inputs", "needs", "visible_pairs"]


def needs(case: Case) -> set[str]:
    """What an implementation must have to compute the case."""
    wanted = {
        "packed": case.layout == "varlen",
        "GQA": case.hq != case.hk,
        "dv": case.d != case.dv,
        "float32": case.dtype == "float32",
        "window": case.window is not None,
        "bottom-right": case.align == "bottom_right" and case.sq != case.sk and (case.causal or case.window),
        "lengths": case.q_lengths is not None or case.kv_lengths is not None,
        "segments": case.segments > 0,
        "mask": case.mask is not None,
        "bias": case.bias is not None,
        "ALiBi": case.alibi_slopes is not None,
        "sinks": case.sinks,
        "scale": case.scale is not None,
        "softcap": case.softcap is not None,
        "dropout": case.dropout_rate > 0,
    }
    return {name for name, want in wanted.items() if want}


def flop(case: Case, pass_: str) -> float:
    """Products of the visible pairs: q·k and p·v forward; backward s again, dp, and those of dq, dk, dv."""
    d, dv = case.d, case.dv
    features = {"forward": d + dv, "backward": 3 * d + 2 * dv, "both": 4 * d + 3 * dv}[pass_]
    return 2.0 * features * case.hq * visible_pairs(case)


def visible_pairs(case: Case) -> int:
    """Pairs (query, key) in the band, of one head over the whole batch; masks and segments take none away."""
    if case.kv_lengths is not None:
        one = case.replace(b=1, kv_lengths=None)
        return sum(visible_pairs(one.replace(sk=length)) for length in case.kv_lengths)
    if case.layout == "varlen":
        k_sequences = case.q_sequences if case.k_sequences is None else case.k_sequences
        return sum(_band(case, sq, sk) for sq, sk in zip(case.q_sequences, k_sequences, strict=True))
    return case.b * _band(case, case.sq, case.sk)


def _band(case: Case, sq: int, sk: int) -> int:
    diagonal = np.arange(sq) + (sk - sq if case.align == "bottom_right" else 0)
    left, right = case.window or (None, None)
    right = 0 if case.causal else right
    high = np.full(sq, sk - 1) if right is None else np.minimum(diagonal + right, sk - 1)
    low = np.zeros(sq, int) if left is None else np.maximum(diagonal - left, 0)
    return int(np.maximum(high - low + 1, 0).sum())


def _both(b: int, s: int, hq: int, hk: int, d: int, dtype: str) -> list[Case]:
    """A shape, full and causal."""
    name = f"b{b} s{s} h{hq}/{hk} d{d} {dtype}"
    full = Case(name, b=b, sq=s, sk=s, hq=hq, hk=hk, d=d, dv=d, dtype=dtype)
    return [full, full.replace(name=f"{name} causal", causal=True)]


def _options(base: Case) -> list[Case]:
    """What each option costs, one at a time, on one causal shape."""
    b, s, h = base.b, base.sq, base.hq
    return [
        base.replace(name=f"{base.name} window", window=(256, 0)),
        base.replace(name=f"{base.name} softcap", softcap=30.0),
        base.replace(name=f"{base.name} bias", bias=(1, h, s, s)),
        base.replace(name=f"{base.name} segments", segments=4),
        base.replace(name=f"{base.name} lengths", kv_lengths=tuple(s - s // 4 * (i % 2) for i in range(b))),
        base.replace(name=f"{base.name} ALiBi", alibi_slopes=(h,)),
        base.replace(name=f"{base.name} dropout", dropout_rate=0.1),
    ]


def _packed(lengths: tuple[int, ...], hq: int, hk: int, d: int, dtype: str) -> Case:
    name = f"{len(lengths)} packed t{sum(lengths)} h{hq}/{hk} d{d} {dtype} causal"
    return varlen(name, lengths, causal=True, hq=hq, hk=hk, d=d, dv=d, dtype=dtype)


# 16,384 tokens and heads × d = 2048: the shapes that the field reports.
GPU = [
    *(
        case
        for d in (64, 128, 256)
        for s in (1024, 4096, 16384)
        for case in _both(16384 // s, s, 2048 // d, 2048 // d, d, "bfloat16")
    ),
    *_both(4, 4096, 32, 8, 128, "float16"),
    *_options(_both(4, 4096, 16, 16, 128, "bfloat16")[1]),
    _packed((4096, 2048, 1024, 512, 512, 4096, 3072, 1024), 16, 16, 128, "bfloat16"),
]
CPU = [
    *(
        case
        for dtype in ("float32", "bfloat16")
        for b, s, hq, hk, d in ((4, 512, 4, 4, 64), (1, 2048, 8, 8, 64), (1, 2048, 8, 2, 128))
        for case in _both(b, s, hq, hk, d, dtype)
    ),
    *_options(_both(2, 1024, 8, 8, 64, "float32")[1]),
    _packed((512, 300, 77, 135, 700, 324), 8, 8, 64, "float32"),
]
