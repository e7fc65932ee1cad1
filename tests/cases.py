"""Named cases, shared by the tests and the benchmarks."""

from __future__ import annotations

import forms
from attention_case import (
    DTYPES,
    OPTIONS,
    Case,
    Inputs,
    cu_seqlens,
    make_inputs,
    operands,
    poisoned,
    spec,
    token_dims,
    used,
    varlen,
)

__all__ = [
    "ARRAYS",
    "BY_NAME",
    "CASES",
    "DTYPES",
    "FIXED",
    "FIXED_TILES",
    "FORMS",
    "OPTIONS",
    "VARLEN",
    "VARLEN_TILES",
    "Case",
    "Inputs",
    "cu_seqlens",
    "make_inputs",
    "operands",
    "poisoned",
    "spec",
    "token_dims",
    "used",
    "varlen",
]

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
    Case("bias first", bias=(2, 4, 12, 12), bias_first=True, softcap=1.5, scale=0.4),
    Case("bias of rows, first", bias=(2, 1, 12, 1), bias_first=True, softcap=1.5, sinks=True),
    Case("bias first, without a softcap", bias=(2, 1, 1, 13), sk=13, bias_first=True),
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
        for number, names in enumerate(
            [*((name,) for name in forms.FORMS if name not in ("function", "tiles")), *_PAIRS]
        )
    ),
    Case("everything, bias first", sq=18, sk=27, causal=True, window=(11, None), softcap=4.0, mask=(1, 4, 1, 27),
         bias=(2, 1, 18, 27), bias_first=True, segments=2, q_lengths=(18, 14), kv_lengths=(20, 27),
         alibi_slopes=(2, 4), sinks=True, dropout_rate=0.2, scale=-0.3),
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
    Case("more tiles than teams, causal", causal=True, sq=300, sk=290, d=32, dv=32, hq=90, hk=2, b=1),
    Case("more tiles than blocks, window", window=(40, 40), sq=300, sk=300, d=128, dv=128, hq=48, hk=2, b=1),
    Case(
        "more tiles than teams, window, d32", window=(40, 40), sq=400, sk=400, d=32, dv=32, hq=68, hk=2, b=1
    ),
    Case(
        "more tiles than blocks, lengths", kv_lengths=(270,), sq=192, sk=300, d=64, dv=64, hq=140, hk=4, b=1
    ),
    Case("more tiles than teams, window", window=(40, 40), sq=400, sk=400, d=64, dv=64, hq=68, hk=4, b=1),
    Case("few queries, many keys", sq=150, sk=1705, d=128, dv=128, hq=2, hk=1, b=1),
    Case("few tokens of many heads", causal=True, sq=3, sk=330, d=64, dv=64, hq=75, hk=1, b=1),
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
    Case(
        "blocks of every head, several tiles",
        sq=240,
        sk=300,
        b=1,
        hq=4,
        hk=2,
        forms=("blocks",),
        form_seed=25,
    ),
)
VARLEN_TILES = (
    varlen("packed, many keys", (130, 70), k_sequences=(2001, 1601), causal=True, d=128, dv=128, hq=34, hk=2),
    varlen("packed, many queries", (150, 90, 60), causal=True, d=64, dv=64, hq=28, hk=4),
    varlen("packed, many queries, all keys", (270, 390), d=64, dv=64, hq=14, hk=2),
    varlen("packed, more tiles than blocks", (270, 390), d=64, dv=64, hq=40, hk=2),
    varlen("packed, more tiles than teams", (270, 390), causal=True, d=64, dv=64, hq=40, hk=2),
)

# Boolean arrays beside packed keys, and functions. The oracle's limits for packed pairs are more than the operand
# `ranges` may have, so that only public functions run these.
ARRAYS = (
    Case("masks: function", forms=("function",), form_seed=98, sq=40, sk=50),
    *(
        varlen(
            f"packed {' and '.join(names)}, {seed}",
            (9, 0, 40, 70),
            k_sequences=(12, 2, 60, 90),
            padding=(3, 4),
            forms=names,
            form_seed=seed,
            hq=2,
        )
        for names, seed in [
            *((("dense",), seed) for seed in (0, 2, 4, 6, 8)),
            (("function",), 3),
            (("dense", "blocks"), 4),
            (("tiles",), 5),
        ]
    ),
    Case("masks: tiles", forms=("tiles",), form_seed=5, b=1, sq=200, sk=300),
)

CASES = FIXED + FORMS + VARLEN + FIXED_TILES + VARLEN_TILES + ARRAYS
BY_NAME = {case.name: case for case in CASES}
