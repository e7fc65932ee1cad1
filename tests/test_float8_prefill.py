"""Prompts over float8 pages. On Hopper a warpgroup widens their tiles, scales of K multiply S, and those of V o."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pages
import pytest
from cases import Case, varlen
from conftest import IMPLEMENTATION
from pages import FLOAT8, paged, require
from plans import plan
from test_page_scales import check_scales
from test_return_max import assert_paged

PROMPT = Case("prompt", b=2, sq=200, sk=700, kv_lengths=(700, 331), hq=4, hk=2, causal=True)
PACKED = varlen(
    "packed",
    (150, 1, 300, 0, 20),
    k_sequences=(600, 290, 300, 5, 19),
    padding=(3, 0),
    hq=4,
    hk=2,
    causal=True,
)


@pytest.mark.parametrize("pool_dtype", FLOAT8)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("d", [64, 96, 128, 256])
def test_prompts(d, dtype, pool_dtype):
    """Boxes of a whole tile and of parts of one; one scale for a pool and one for each page; both layouts."""
    half = dict(d=d, dv=d, dtype=dtype)
    pages.check(paged(PROMPT.replace(**half), 16, "hnd", pool_dtype), IMPLEMENTATION)
    pages.check(paged(PACKED.replace(**half), 256, "nhd", pool_dtype, by_page=True), IMPLEMENTATION)


@pytest.mark.parametrize(
    ("size", "layout"), [(8, "nhd"), (24, "hnd"), (48, "nhd"), (64, "hnd"), (1024, "nhd")]
)
def test_pages_of_every_size(size, layout):
    """Where a page is no part of a tile, and none of a page, boxes have what divides both."""
    for d, by_page in ((128, True), (256, True), (64, False)):
        case = PACKED.replace(d=d, dv=d, dtype="bfloat16")
        pages.check(paged(case, size, layout, FLOAT8[0], by_page=by_page), IMPLEMENTATION)


OPTIONS = (
    dict(window=(90, 0), sinks=True),
    dict(softcap=2.0),
    dict(alibi_slopes=(2, 4), softcap=3.0),
    dict(scale=-0.3),
    dict(scale=0.0),
    dict(causal=False),
    dict(align="top_left"),
    dict(d=64, dv=32),
    dict(hq=6, hk=6),
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("by_page", [False, True])
def test_options(options, by_page):
    case = PROMPT.replace(**{"d": 128, "dv": 128, "dtype": "bfloat16"} | options)
    pages.check(paged(case, 32, "nhd", FLOAT8[0], by_page=by_page), IMPLEMENTATION)


@pytest.mark.parametrize("by_page", [False, True])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_few_tokens_of_many_heads(d, by_page):
    """On an H200 tiles hold all query heads of a KV head."""
    lengths = tuple(int(x) for x in np.random.default_rng(5).integers(8, 301, 33))
    few = Case("few", b=33, sq=8, sk=300, kv_lengths=lengths, hq=32, hk=4, d=d, dv=d, dtype="bfloat16")
    for case in (few.replace(causal=True), few.replace(draft_mask=(33, 8, 8))):
        pages.check(paged(case, 16, "nhd", FLOAT8[0], by_page=by_page), IMPLEMENTATION)


def test_other_scales_than_powers_of_two(implementation):
    """Scales by head and by page are float32: those of K are not rounded, and those of V once."""
    require(implementation)
    call = paged(PROMPT.replace(d=128, dv=128, dtype="bfloat16"), 16, pool_dtype=FLOAT8[0])
    rng = np.random.default_rng(3)
    for shape in ((call.case.hk,), (call.pages.count, call.case.hk)):
        scales = {x: jnp.asarray(rng.uniform(0.1, 1.5, shape), jnp.float32) for x in ("k_scale", "v_scale")}
        check_scales(call, scales, implementation)


def test_return_max(implementation):
    require(implementation)
    call = paged(PROMPT.replace(d=128, dv=128, dtype="bfloat16"), 16, pool_dtype=FLOAT8[0], by_page=True)
    assert_paged(call, implementation)


@pytest.mark.parametrize("form", ["prefix", "spans", "first", "either"])
def test_masks(form):
    case = PROMPT.replace(d=64, dv=64, dtype="bfloat16", causal=False, forms=(form,))
    pages.check(paged(case, 16, pool_dtype=FLOAT8[0]), IMPLEMENTATION)


@pytest.mark.parametrize("by_page", [False, True])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_missing_pages(implementation, d, by_page):
    """Rows that see a key of a page outside the pool are NaN, and no others."""
    require(implementation)
    call = paged(PROMPT.replace(d=d, dv=d, dtype="bfloat16"), 64, pool_dtype=FLOAT8[0], by_page=by_page)
    for page, first in ((9, 576), (10, 640)):
        tables = call.arrays["block_tables"].at[0, page].set(call.pages.count)
        hit = np.zeros((2, 200), bool)
        hit[0] = np.arange(500, 700) >= first
        pages.assert_nan_where(hit, *call.call(implementation)({"block_tables": tables}))


def test_the_kernels():
    call = {"paged": True, "float8": True, "page_size": 16, "q_rows": 2048, "k_rows": 8192}

    def row(**options):
        return plan(**call | options)["row"]

    for d, kernel in ((64, 64), (96, 128), (128, 128), (256, 256), (192, 256)):
        chosen = row(d=d, dv=d)
        assert (chosen["arch"], chosen["d"], chosen["warps"]) == ("sm90", kernel, 16)
    few = row(d=128, dv=128, batch=33, q_rows=8, heads=32, kv_heads=4)
    assert (few["design"], few["warps"], few["dtypes"]) == ("packed_heads", 16, ("float16", "bfloat16"))
    some = dict(d=128, dv=128, batch=66, heads=32, kv_heads=4)
    assert row(**some, q_rows=4)["design"] == "packed_heads" != row(**some, q_rows=2)["design"]
    assert row(**some, q_rows=4, float8=False)["design"] != "packed_heads"
    assert row(d=128, dv=128, softcap=3.0)["arch"] == row(d=128, dv=128, varlen=True)["arch"] == "sm90"
    # Rows of a pool have to be copied 16 bytes at a time, and boxes have 8 rows of one page.
    for other in (dict(d=72, dv=72), dict(page_size=12), dict(d=512, dv=512), dict(dtype="float32")):
        assert row(**other)["arch"] == "sm80"
    assert row(float8=False, d=128, dv=128)["warps"] == 12
