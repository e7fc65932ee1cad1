"""A few tokens of many sequences: on an H200 a tile holds all query heads of a KV head, with every option that decode
has for such calls."""

from __future__ import annotations

import checks
import jax.numpy as jnp
import numpy as np
import pages
import pytest
from cases import Case, varlen
from conftest import IMPLEMENTATION
from pages import FLOAT8, paged
from test_return_max import assert_paged

# 36 or 40 rows of each of 264 KV heads: two waves of tiles on 132 SMs. Some sequences have fewer keys than tokens.
# The CPU's kernels do not depend on the number of sequences.
SEQUENCES, PACKED_SEQUENCES = (33, 27) if IMPLEMENTATION == "cuda" else (11, 11)
LENGTHS = tuple({3: 0, 7: 5, 9: 9}.get(i, 9 + i * 37 % 320) for i in range(SEQUENCES))
FEW = Case("few", b=SEQUENCES, sq=9, sk=330, kv_lengths=LENGTHS, hq=32, hk=8, causal=True)


def options_of(n):
    """Options for n sequences, alone and combined."""
    return (
        dict(window=(3, 0)),
        dict(window=(150, 0), sinks=True),
        dict(window=(140, 2), causal=False, draft_mask=(n, 9, 9)),
        dict(window=(64, None), causal=False),
        dict(sinks="token"),
        dict(softcap=2.0),
        dict(softcap=70.0, window=(200, 0)),
        dict(alibi_slopes=(32,)),
        dict(alibi_slopes=(n, 32), causal=False, window=(None, 3)),
        dict(scale=-0.3),
        dict(scale=0.0, sinks=True),
        dict(softcap=3.0, alibi_slopes=(32,), sinks="token", window=(130, 0), draft_mask=(n, 9, 9)),
    )


OPTIONS = options_of(SEQUENCES)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("d", "dtype"), [(64, "bfloat16"), (128, "float16"), (256, "bfloat16")])
def test_options(options, d, dtype):
    case = FEW.replace(d=d, dv=d, dtype=dtype, **options)
    pages.check(paged(case, 16), IMPLEMENTATION)
    if d <= 128:  # a group of eight heads, of which a tile holds eight tokens
        wide = case.replace(hq=64, hk=8, alibi_slopes=None, sq=5, draft_mask=None)
        pages.check(paged(wide, 64, "hnd", FLOAT8[0], by_page=d == 64), IMPLEMENTATION)


@pytest.mark.parametrize(
    "options",
    [{"softcap": 2.0}, {"alibi_slopes": (32,)}, {"draft_mask": (50, 5, 5)}, {"window": (70, 0)}],
    ids=str,
)
@pytest.mark.parametrize("d", [40, 128])
def test_rows_that_decode_takes_without_options(options, d):
    lengths = tuple(9 + i * 37 % 320 for i in range(50))
    case = FEW.replace(b=50, sq=5, kv_lengths=lengths, d=d, dv=d, dtype="bfloat16", **options)
    pages.check(paged(case, 16), IMPLEMENTATION)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_head_dim_512(options):
    case = FEW.replace(d=512, dv=512, dtype="bfloat16", **options)
    pages.check(paged(case, 32), IMPLEMENTATION)


@pytest.mark.parametrize("options", [x for x in OPTIONS if "draft_mask" not in x], ids=str)
def test_contiguous_keys(options):
    checks.compare(FEW.replace(d=128, dv=128, dtype="bfloat16", **options), IMPLEMENTATION)


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 2.0}, {"alibi_slopes": (32,)}, {"window": (64, 0)}], ids=str
)
def test_return_max(options):
    pages.require(IMPLEMENTATION)
    assert_paged(paged(FEW.replace(d=64, dv=64, dtype="bfloat16", **options), 16), IMPLEMENTATION)


# Packed sequences of 0 to 29 tokens; decode runs those of one token, and tiles take the tokens of one sequence.
COUNTS = tuple((5, 1, 0, 9, 2, 17, 5, 29, 4, 3)[i % 10] + i // 10 for i in range(PACKED_SEQUENCES))
KEYS = tuple({3: 4, 7: 0, 9: 2}.get(i, 40 + i * 37 % 320) for i in range(PACKED_SEQUENCES))
PACKED = varlen("packed", COUNTS, k_sequences=KEYS, padding=(7, 9), hq=32, hk=8, causal=True)
PACKED_OPTIONS = ({}, *options_of(PACKED_SEQUENCES))


@pytest.mark.parametrize("options", PACKED_OPTIONS, ids=str)
@pytest.mark.parametrize(("d", "dtype"), [(64, "bfloat16"), (128, "float16"), (256, "bfloat16")])
def test_packed_sequences(options, d, dtype):
    """Some have more tokens than the draft mask has rows."""
    case = PACKED.replace(d=d, dv=d, dtype=dtype, **options)
    pages.check(paged(case, 16), IMPLEMENTATION)
    if d <= 128:
        wide = case.replace(hq=64, alibi_slopes=None)
        pages.check(paged(wide, 64, "hnd", FLOAT8[0], by_page=d == 64), IMPLEMENTATION)


@pytest.mark.parametrize("options", PACKED_OPTIONS[::3], ids=str)
def test_packed_sequences_of_head_dim_512(options):
    pages.check(paged(PACKED.replace(d=512, dv=512, dtype="bfloat16", **options), 32), IMPLEMENTATION)


@pytest.mark.parametrize("options", [PACKED_OPTIONS[i] for i in (0, 2, 9)], ids=str)
@pytest.mark.parametrize("d", [64, 128, 512])
def test_packed_sequences_of_contiguous_keys(options, d):
    checks.compare(PACKED.replace(d=d, dv=d, dtype="bfloat16", **options), IMPLEMENTATION)


def test_a_prompt_among_packed_sequences():
    """Its tiles read keys only as far as their tokens see, and sequences that are not in order run none by decode."""
    counts = (1, 300, 5, 1, 3)
    # Tiles of single heads would need two waves of an H200, so heads are packed.
    case = varlen("prompt", counts, k_sequences=(200, 310, 280, 1, 3), hq=32, hk=4, causal=True)
    for d, dtype, window in ((64, "float16", (70, 0)), (128, "bfloat16", None), (256, "bfloat16", (9, None))):
        call = paged(case.replace(d=d, dv=d, dtype=dtype, window=window), 16)
        pages.check(call, IMPLEMENTATION)
        # Read as its running maximum: sequence 1 has no tokens.
        falls = call.arrays["cu_seqlens_q"].at[2].set(0)
        got, wanted = (call.call(which)({"cu_seqlens_q": falls}) for which in (IMPLEMENTATION, "xla"))
        for x, y in zip(got, wanted, strict=True):
            np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), atol=0.02)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"window": (64, 0)}], ids=str)
def test_return_max_of_packed_sequences(options):
    pages.require(IMPLEMENTATION)
    assert_paged(paged(PACKED.replace(d=64, dv=64, dtype="bfloat16", **options), 16), IMPLEMENTATION)


def test_pages_before_a_window_may_be_missing():
    """Rows that see a key of a missing page are NaN, and no others."""
    pages.require(IMPLEMENTATION)
    case = FEW.replace(d=64, dv=64, dtype="bfloat16", window=(40, 0), kv_lengths=(330,) * SEQUENCES)
    call = paged(case, 16)
    tables = call.arrays["block_tables"].at[0, :18].set(call.pages.count)  # keys before 288
    tables = tables.at[1, :17].set(call.pages.count)  # keys before 272
    hit = np.zeros((SEQUENCES, 9), bool)
    hit[0] = np.arange(321, 330) - 40 < 288
    pages.assert_nan_where(hit, *call.call(IMPLEMENTATION)({"block_tables": jnp.asarray(tables)}))
