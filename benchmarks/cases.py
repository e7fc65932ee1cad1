"""The shapes that are timed: the tests' Case, at sizes where speed matters."""

from __future__ import annotations

from typing import Any

from tests.cases import Case, Inputs, make_inputs, varlen

__all__ = ["CPU", "GPU", "Case", "Inputs", "make_inputs", "varlen"]

# --- GPU: 16,384 tokens in all and heads · head dim = 2048, as in the FlashAttention papers -------------------------

TOKENS, WIDTH = 16384, 2048
HEAD_DIMS = (64, 128, 256)
LENGTHS = (1024, 4096, 16384)
DOCUMENTS = (100, 8000, 300, 2500, 1200, 4284)  # lengths of packed sequences, TOKENS in all


def gpu_case(d: int, s: int, causal: bool = False, **options: Any) -> Case:
    h = WIDTH // d
    sizes = {"b": max(1, TOKENS // s), "sq": s, "sk": s, "hq": h, "hk": h, "d": d, "dv": d}
    name = f"d{d} s{s}{' causal' if causal else ''}"
    return Case(name, causal=causal, **({"dtype": "bfloat16"} | sizes | options))


def heads_case(name: str, b: int, s: int, hq: int, hk: int, d: int, **options: Any) -> Case:
    """The heads of a model, under a causal mask."""
    sizes = {"b": b, "sq": s, "sk": s, "hq": hq, "hk": hk, "d": d, "dv": d, "causal": True}
    return Case(name, **({"dtype": "bfloat16"} | sizes | options))


def gpu_documents(d: int, causal: bool) -> Case:
    h = WIDTH // d
    sizes = {"hq": h, "hk": h, "d": d, "dv": d, "dtype": "bfloat16"}
    return varlen(f"d{d} documents{' causal' if causal else ''}", DOCUMENTS, causal=causal, **sizes)


MATRIX = tuple(gpu_case(d, s, causal) for d in HEAD_DIMS for s in LENGTHS for causal in (False, True))
GQA = (
    heads_case("64/8 heads d128 s16384 causal", 1, 16384, 64, 8, 128),
    heads_case("2 × 32/8 d128 s8192 causal", 2, 8192, 32, 8, 128),
    heads_case("2 × 16/2 d256 s8192 causal", 2, 8192, 16, 2, 256),
    heads_case("2 × 64/8 d64 s8192 causal", 2, 8192, 64, 8, 64),
)
FLOAT32 = tuple(
    gpu_case(d, 1024, causal, dtype="float32").replace(name=f"d{d} s1024{' causal' * causal} float32")
    for d in HEAD_DIMS
    for causal in (False, True)
)
# Sequences, tokens, heads and head dims of SigLIP, DiT-XL, ViT-H, phi-2, phi-3, and of long calls.
BETWEEN_64_AND_96 = tuple(
    heads_case(f"{b} × {s} {h} × {d}{' causal' * causal}", b, s, h, h, d).replace(causal=causal)
    for b, s, h, d, causal in (
        (64, 729, 16, 72, False),
        (128, 256, 16, 72, False),
        (64, 257, 16, 80, False),
        (2, 8192, 24, 80, False),
        (4, 2048, 32, 80, True),
        (4, 2048, 32, 96, True),
        (2, 8192, 20, 96, False),
        (2, 8192, 20, 96, True),
    )
)
# Biases that a batch shares, beside masks of each sequence's keys: AlphaFold's triangle attention and T5's encoder.
BIASED = tuple(
    heads_case(f"{what}: {b} × {s} {h} × {d}", b, s, h, h, d).replace(
        bias=(1, h, s, s), bias_dtype="bfloat16", mask=(b, 1, 1, s) if masked else None, dropout_rate=rate
    )
    for what, b, s, h, d, masked, rate in (
        ("AlphaFold", 384, 384, 4, 32, True, 0.0),
        ("AlphaFold", 256, 768, 4, 32, True, 0.0),
        ("AlphaFold without a mask", 384, 384, 4, 32, False, 0.0),
        ("T5", 32, 512, 12, 64, True, 0.0),
        ("T5 with dropout", 32, 512, 12, 64, True, 0.1),
        ("T5 without a mask", 32, 512, 12, 64, False, 0.0),
    )
)
MLA = heads_case("128 heads d192/128 s4096 causal", 1, 4096, 128, 128, 192, dv=128)  # DeepSeek-V3's heads
WINDOWS = (
    heads_case("2 × 64/8 d64 s8192 window 128", 2, 8192, 64, 8, 64, window=(127, 0)),  # gpt-oss
    heads_case("32/8 d128 s16384 window 4096", 1, 16384, 32, 8, 128, window=(4095, 0)),
    heads_case("16/16 d128 s16384 window 1024", 1, 16384, 16, 16, 128, window=(1023, 0)),
    heads_case("32/32 d64 s16384 window 1024", 1, 16384, 32, 32, 64, window=(1023, 0)),
    heads_case("16/8 d256 s16384 window 1024", 1, 16384, 16, 8, 256, window=(1023, 0)),  # Gemma 3
)


def gpu_options(d: int, causal: bool = False) -> dict[str, Case]:
    """Each option alone, at s 4096."""
    plain = gpu_case(d, 4096, causal)
    s, h = plain.sq, plain.hq
    options: dict[str, dict[str, Any]] = {
        "bias": {"bias": (1, 1, s, s), "bias_dtype": "bfloat16"},
        "bias of each head": {"bias": (1, h, s, s), "bias_dtype": "bfloat16"},
        "alibi": {"alibi_slopes": (h,)},
        "softcap": {"softcap": 20.0},
        "dropout": {"dropout_rate": 0.1},
        "sinks": {"sinks": True},
        "segments": {"segments": 4},
    }
    return {what: plain.replace(name=f"{plain.name} {what}", **option) for what, option in options.items()}


# Sequences, query heads, KV heads, head dim, keys: decode, one query token of each sequence.
DECODE = (
    (24, 24, 24, 128, 1024),
    (24, 24, 24, 128, 8192),
    (64, 32, 8, 128, 1024),
    (64, 32, 8, 128, 8192),
    (8, 32, 8, 128, 65536),
    (1, 32, 8, 128, 131072),
    (128, 64, 8, 128, 4096),
    (64, 8, 1, 256, 8192),
    (64, 64, 8, 64, 8192),
    (1, 32, 8, 128, 512),
)


def decode_name(shape: tuple[int, ...]) -> str:
    b, hq, hk, d, keys = shape
    return f"decode b{b} {hq}/{hk} d{d} kv{keys}"


SMALL_HEADS = 16
SMALL = tuple((d, s, causal) for d in (64, 128) for s in (512, 1024) for causal in (False, True))


def ring_case(s: int, what: str, h: int = 16, d: int = 128) -> Case:
    """One sequence; `what` is full, causal or window (causal, of 4,096 keys)."""
    window = {"window": (4095, 0)} if what == "window" else {}
    sizes = {"b": 1, "sq": s, "sk": s, "hq": h, "hk": h, "d": d, "dv": d, "dtype": "bfloat16"}
    return Case(f"s{s} h{h} d{d} {what}", causal=what != "full", **sizes, **window)


def small_case(d: int, s: int, causal: bool) -> Case:
    """One short sequence, whose call takes microseconds."""
    sizes = {"b": 1, "sq": s, "sk": s, "hq": SMALL_HEADS, "hk": SMALL_HEADS, "d": d, "dv": d}
    name = f"b1 h{SMALL_HEADS} d{d} s{s}{' causal' if causal else ''}"
    return Case(name, causal=causal, dtype="bfloat16", **sizes)


# --- CPU ------------------------------------------------------------------------------------------------------------

CPU_SHAPES = {"s512": (4, 512, 4, 64), "s2048": (1, 2048, 8, 64), "s4096": (1, 4096, 8, 128)}  # b, s, h, d
CPU_DTYPES = ("float32", "bfloat16")
CPU_DECODE = (8, 32, 8, 128, 4096)  # as DECODE; pages of CPU_PAGE
CPU_DECODE_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn")
CPU_PAGE = 16


def cpu_case(shape: str, dtype: str, **options: Any) -> Case:
    b, s, h, d = CPU_SHAPES[shape]
    sizes = {"b": b, "sq": s, "sk": s, "hq": h, "hk": h, "d": d, "dv": d}
    return Case(f"b{b} s{s} h{h} d{d} {dtype}", dtype=dtype, **sizes, **options)


def cpu_options(dtype: str) -> dict[str, tuple[Case, Case]]:
    """For each option, the call without it and the call with it."""
    plain = cpu_case("s2048", dtype)
    s, h = plain.sq, plain.hq
    batch = plain.replace(b=2, sq=s // 2, sk=s // 2)
    sizes = {"hq": h, "hk": h, "d": plain.d, "dv": plain.d, "dtype": dtype}
    return {
        "window": (plain, plain.replace(window=(s // 4, s // 4))),
        "segments": (plain, plain.replace(segments=4)),
        "softcap": (plain, plain.replace(softcap=30.0)),
        "bias": (plain, plain.replace(bias=(1, h, s, s))),
        "ALiBi": (plain, plain.replace(alibi_slopes=(h,))),
        "sinks": (plain, plain.replace(sinks=True)),
        "lengths": (batch, batch.replace(kv_lengths=(s // 2, s // 4 + 77))),
        "varlen": (batch, varlen("documents", (700, 324, 1024), **sizes)),
        "dropout": (plain, plain.replace(dropout_rate=0.1)),
    }


def cpu_pairs(dtype: str) -> dict[str, tuple[Case, Case]]:
    """Pairs of shapes; the time of the second is bounded by that of the first."""
    heads = cpu_case("s2048", dtype)
    sizes = {"hq": 4, "hk": 4, "d": 64, "dv": 64, "dtype": dtype, "causal": True}
    batched = Case(f"b8 s512 h4 d64 {dtype}", b=8, sq=512, sk=512, **sizes)
    long = Case(f"b1 s16384 h2 d64 {dtype}", b=1, sq=16384, sk=16384, hq=2, hk=2, d=64, dv=64, dtype=dtype)
    return {
        "GQA 8:1": (heads, heads.replace(hk=1)),
        "equal documents": (batched, varlen("documents", (512,) * 8, **sizes)),
        "window 256 at s 16,384": (long, long.replace(window=(256, 0))),
    }


def cpu_small(dtype: str) -> Case:
    """A call so small that its overhead counts."""
    return Case(f"b1 s64 h4 d64 {dtype}", b=1, sq=64, sk=64, hq=4, hk=4, d=64, dv=64, dtype=dtype)


# --- the runner's own lists (python -m benchmarks) ------------------------------------------------------------------


def _both(b: int, s: int, hq: int, hk: int, d: int, dtype: str) -> list[Case]:
    """The shape without a mask and with a causal one."""
    name = f"b{b} s{s} h{hq}/{hk} d{d} {dtype}"
    full = Case(name, b=b, sq=s, sk=s, hq=hq, hk=hk, d=d, dv=d, dtype=dtype)
    return [full, full.replace(name=f"{name} causal", causal=True)]


def _each_option(base: Case) -> list[Case]:
    """One causal shape with each option."""
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


GPU = [
    *MATRIX,
    *GQA,
    MLA,
    *WINDOWS,
    *_both(4, 4096, 32, 8, 128, "float16"),
    *_each_option(gpu_case(128, 4096, causal=True)),
    gpu_documents(64, causal=True),
    gpu_documents(128, causal=True),
]
CPU = [
    *(
        case
        for dtype in CPU_DTYPES
        for b, s, hq, hk, d in ((4, 512, 4, 4, 64), (1, 2048, 8, 8, 64), (1, 2048, 8, 2, 128))
        for case in _both(b, s, hq, hk, d, dtype)
    ),
    *_each_option(_both(2, 1024, 8, 8, 64, "float32")[1]),
    _packed((512, 300, 77, 135, 700, 324), 8, 8, 64, "float32"),
]
