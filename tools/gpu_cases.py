"""The cases of gpu_check.py: those of the test suite, and larger ones over several tiles."""

from __future__ import annotations

from typing import Any

HEAD_DIMS = ((32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
PADDED_HEAD_DIMS = ((8, 8), (40, 40), (64, 24), (72, 128), (160, 112), (224, 224))
DTYPES = ("bfloat16", "float16", "float32")
SAME = "the query's"  # of a bias


def all_cases(emulated: bool, dtypes: tuple[str, ...]) -> list[Any]:
    """Emulated: smaller, and of every case one dtype."""
    made = []
    for i, case in enumerate(_suite(emulated) + _head_dims(emulated) + _options(emulated) + _alone(emulated)):
        chosen = (dtypes[i % len(dtypes)],) if emulated else dtypes
        for dtype in chosen:
            bias = dtype if case.bias_dtype == SAME else case.bias_dtype
            made.append(case.replace(dtype=dtype, bias_dtype=bias, name=f"{case.name}, {dtype}"))
    return made


def _suite(emulated: bool) -> list[Any]:
    """The cases of the test suite, with head dims that need no copy; emulated: those of few scores."""
    from cases import CASES

    chosen = [case for case in CASES if not emulated or _scores(case) <= 300_000]
    return [case.replace(d=-(-case.d // 8) * 8, dv=-(-case.dv // 8) * 8) for case in chosen]


def _scores(case: Any) -> int:
    if case.layout == "fixed":
        return case.b * case.hq * case.sq * case.sk
    keys = case.k_sequences or case.q_sequences
    return case.hq * sum(q * k for q, k in zip(case.q_sequences, keys, strict=True))


def _sizes(emulated: bool) -> dict[str, int]:
    sq, sk = (150, 170) if emulated else (300, 1100)
    return {"b": 1, "hq": 2, "hk": 1, "sq": sq, "sk": sk}


def _head_dims(emulated: bool) -> list[Any]:
    """Every row of the kernel table, plain and general."""
    from cases import Case

    sizes = _sizes(emulated)
    general = {"softcap": 5.0, "bias": (1, 2, sizes["sq"], sizes["sk"]), "dropout_rate": 0.2}
    made = []
    for d, dv in HEAD_DIMS + PADDED_HEAD_DIMS:
        made.append(Case(f"d {d}/{dv}", d=d, dv=dv, causal=True, **sizes))
        if not emulated:
            made.append(Case(f"general d {d}/{dv}", d=d, dv=dv, window=(200, 50), **general, **sizes))
    return made


def _alone(emulated: bool) -> list[Any]:
    """One option of the score at every head dim: sm_90 has kernels for each."""
    from cases import Case

    if emulated:  # which has none of them
        return []
    sizes = _sizes(emulated) | {"b": 2, "sk": 1104}
    bias = {"bias": (2, 1, sizes["sq"], sizes["sk"]), "bias_dtype": SAME}
    shorter = {"q_lengths": (sizes["sq"] - 7, 64), "kv_lengths": (sizes["sk"] - 20, 130), "causal": True}
    options = {
        "alibi": {"alibi_slopes": (2,)},
        "segments": {"segments": 3},
        "softcap of small scores": {"softcap": 20.0},
        "softcap": {"softcap": 7.0},
        "softcap of large scores": {"softcap": 50.0, "scale": 5.0},
        "dropout": {"dropout_rate": 0.3},
        "more dropout": {"dropout_rate": 0.7},
        "bias": bias,
        "bias of heads": bias | {"bias": (1, 2, sizes["sq"], sizes["sk"])},
    }
    return [
        Case(f"{name} alone{also} d {d}/{dv}", d=d, dv=dv, **option, **sizes, **band)
        for d, dv in HEAD_DIMS
        for name, option in options.items()
        for also, band in (("", {"window": (300, 400)}), (", causal, shorter", shorter))
        if band is not shorter or d in (64, 128, 256)
    ]


def _options(emulated: bool) -> list[Any]:
    """Every option over several tiles of queries and keys."""
    from cases import Case, varlen

    size = _sizes(emulated) | {"d": 64, "dv": 64}
    sq, sk = size["sq"], size["sk"]
    lengths = {"q_lengths": (sq - 7,), "kv_lengths": (sk - 20,)}
    packed = {"hq": 4, "hk": 2, "d": 64, "dv": 64, "causal": True}
    others = {"k_sequences": (150, 3, 9, 170, 64), "padding": (70, 3)}
    return [
        Case("large plain", **size),
        Case("large window", window=(40, 3), **size),
        Case("large top left", causal=True, align="top_left", **size),
        Case("large lengths", causal=True, **lengths, **size),
        Case("large mask", mask=(1, 2, sq, sk), **size),
        Case("large bias", bias=(1, 1, sq, sk), bias_dtype="float16", **size),
        Case("large bias of keys", bias=(1, 2, 1, sk), causal=True, **size),
        Case("large bias of rows", bias=(1, 1, sq, 1), bias_dtype="bfloat16", **size),
        Case("large segments", segments=5, **size),
        Case("large alibi", alibi_slopes=(2,), causal=True, **size),
        Case("large dropout", dropout_rate=0.4, **size),
        Case("large scale 0", scale=0.0, sinks=True, **size),
        Case("large negative scale", scale=-0.3, **size),
        Case("large softcap", softcap=3.0, window=(90, None), **size),
        varlen("large packed", (130, 1, 0, 200, 64), **others, **packed),
        varlen(
            "large packed, some keys", (130, 1, 0, 200, 64), kv_lengths=(149, 0, 3, 9, 64), **others, **packed
        ),
        varlen("many sequences", tuple(i % 5 for i in range(600)), **packed),
        varlen("no sequence", (), padding=(140, 20), **packed),
    ]
