"""plan() chooses a kernel, the CTAs' shares of the keys and the workspace for decode and for pages. Needs no GPU."""

from __future__ import annotations

import numpy as np
import pytest
from plans import A10, A100, H200, T4
from plans import plan_decode as plan

from jax_flash.spec import AttentionSpec
from jax_flash.workspace import workspace_bound


@pytest.mark.parametrize(
    ("q_rows", "heads", "block"),
    [(1, 32, 8), (1, 64, 8), (1, 128, 16), (4, 32, 16), (8, 32, 32)],
)
def test_few_rows_of_a_kv_head_decode(q_rows, heads, block):
    """The decode kernel with the smallest query tile runs that holds all query rows of a KV head."""
    chosen = plan(q_rows=q_rows, heads=heads, batch=32)
    assert chosen["row"]["pass"] == "decode"
    assert chosen["row"]["block_m"] == block


@pytest.mark.parametrize(
    "options",
    [
        {"q_rows": 17},
        {"dtype": "float32", "float8": True},
        {"float8": True, "d": 72, "dv": 72},
        {"varlen": True},
        {"operands": ("bias",)},
        {"operands": ("bias", "block_mask"), "block": (64, 64)},
    ],
    ids=str,
)
def test_what_decode_lacks_takes_the_forward_over_pages(options):
    """Calls that no decode kernel supports run the forward with the page loader."""
    row = plan(**options)["row"]
    assert row["pass"] == "forward"
    assert "paged" in row["loaders"]


def test_tiles_of_32_keys_stay_within_the_bound_of_the_workspace():
    """As head dims above 128 have on cards with 100 KB of shared memory."""
    for d in (192, 256, 512):
        chosen = plan(A10, batch=1, k_rows=63, heads=128, kv_heads=1, d=d, dv=d, paged=False)
        assert chosen["workspace"] <= chosen["workspace_bound"]


@pytest.mark.parametrize("device", [H200, A100, T4], ids=["H200", "A100", "T4"])
def test_block_masks_and_arrays_decode(device):
    """Also where clusters, or the forward, would run the same call without a mask. Lists of key tiles take memory."""
    blocks = {"operands": ("block_mask",), "block": (16, 64)}
    calls = [
        blocks,
        blocks | {"block": (1, 1)},
        blocks | {"varlen": True, "q_rows": 64},
        blocks | {"batch": 1, "k_rows": 512},
        {"operands": ("mask",), "paged": False},
        {"operands": ("mask",), "paged": False, "batch": 1, "k_rows": 512},
    ]
    for options in calls:
        chosen, plain = (plan(device, dtype="float16", **x) for x in (options, options | {"operands": ()}))
        row = chosen["decode_row"] if options.get("varlen") else chosen["row"]
        assert (row["pass"], row["design"]) == ("decode", "split_keys")
        assert plain["workspace"] < chosen["workspace"] <= chosen["workspace_bound"]


@pytest.mark.parametrize("heads", [16, 128])
def test_block_masks_of_latent_pools_decode(heads):
    pools = {"heads": heads, "kv_heads": 1, "d": 576, "dv": 512, "value_dim": 512}
    for operands in (("block_mask",), ("block_mask", "ranges")):
        chosen = plan(operands=operands, block=(16, 64), **pools)
        assert chosen["row"] == plan(**pools)["row"]
        for varlen in (False, True):
            chosen = plan(operands=operands, block=(16, 64), q_rows=70, varlen=varlen, **pools)
            assert 0 < chosen["workspace"] <= chosen["workspace_bound"]


def test_an_array_whose_rows_have_positions_runs_the_forward():
    """Decode counts the rows of an array from the call's own first row."""
    assert plan(operands=("mask", "position"), paged=False)["row"]["pass"] == "forward"


def test_prefill_takes_tiles_of_128_keys_whatever_the_page_size():
    for size in (8, 16, 24, 32, 64, 128):
        assert plan(q_rows=2000, page_size=size)["row"]["block_n"] == 128


def test_other_pools_decode_as_well():
    chosen = plan(dtype="float32", d=96, dv=96)["row"]
    assert (chosen["pass"], chosen["d"]) == ("decode", 96)
    for d, row in ((128, 128), (96, 128), (32, 64)):  # float8 kernels have head dims that are multiples of 64
        chosen = plan(float8=True, d=d, dv=d)["row"]
        assert (chosen["pass"], chosen["d"]) == ("decode", row)


def test_packed_sequences_of_few_rows_decode_beside_the_others():
    chosen = plan(varlen=True, q_rows=3000)
    two_tokens = 8  # rows: each KV head has four query heads
    assert chosen["decode"] == {"columns": 8, "ranges": 33, "packed_rows": two_tokens}
    assert (
        plan(varlen=True, q_rows=3000, heads=130, kv_heads=1)["decode"]["packed_rows"] == 160
    )  # tiles of 32
    assert plan(varlen=True, q_rows=3000, heads=1025, kv_heads=1)["decode"]["packed_rows"] == 0
    assert plan(varlen=True, q_rows=0)["decode"]["packed_rows"] == 0


def test_the_draft_mask_says_how_many_tokens_packed_sequences_have():
    drafts = dict(varlen=True, q_rows=3000, operands=("draft_mask",))
    # Each token has four query heads per KV head. Sequences of 17 tokens run the forward.
    for tokens, rows in ((1, 8), (3, 16), (8, 32), (16, 64), (17, 8)):
        assert plan(**drafts, draft_rows=tokens)["decode"]["packed_rows"] == rows
    chosen = plan(**drafts, draft_rows=4)
    assert chosen["score"] == "general"
    assert chosen["decode_row"]["block_m"] == 16


@pytest.mark.parametrize(("q_rows", "name"), [(4, "decode"), (16, "forward")])
def test_a_draft_mask_changes_neither_the_row_nor_the_grid(q_rows, name):
    with_mask = plan(q_rows=q_rows, operands=("draft_mask",), draft_rows=q_rows)
    without = plan(q_rows=q_rows, right=0)
    assert with_mask["row"] == without["row"]
    assert with_mask["row"]["pass"] == name
    assert with_mask["decode"] == without["decode"]
    assert with_mask["queries"] == without["queries"]
    assert with_mask["general"]


def test_contiguous_keys_decode_as_well():
    assert plan(paged=False)["row"]["pass"] == "decode"
    assert plan(paged=False, q_rows=8, batch=32)["row"]["pass"] == "decode"
    assert plan(paged=False, q_rows=9)["row"]["pass"] == "forward"


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize(
    ("call", "block", "columns"),
    [
        ({"heads": 71, "kv_heads": 1}, 32, 3),
        ({"heads": 64, "kv_heads": 1, "q_rows": 3, "batch": 16}, 32, 6),
        ({"heads": 64, "kv_heads": 1, "d": 512, "dv": 512, "batch": 8}, 8, 8),
        ({"heads": 40, "kv_heads": 2, "dtype": "float32", "d": 64, "dv": 64}, 8, 6),
    ],
    ids=str,
)
def test_few_tokens_decode_however_many_heads_share_keys(call, block, columns, paged):
    """The forward would read the keys once for each query head, and its tiles would hold few tokens."""
    chosen = plan(paged=paged, **call)
    assert (chosen["row"]["pass"], chosen["row"]["block_m"]) == ("decode", block)
    assert chosen["decode"]["columns"] == columns
    assert chosen["workspace"] <= chosen["workspace_bound"]


def test_a_wave_of_blocks_or_a_few():
    """The grid fills the 264 CTAs that 132 SMs hold, once, or several times where there are many KV heads."""
    assert plan()["decode"] == {"columns": 8, "ranges": 33, "packed_rows": 0}
    assert plan(heads=24, kv_heads=24)["decode"] == {"columns": 24, "ranges": 11, "packed_rows": 0}
    many = plan(heads=100, kv_heads=100)["decode"]
    assert many["columns"] * many["ranges"] % 264 > 200
    assert plan(heads=2000, kv_heads=2000, d=64, dv=64)["decode"]["ranges"] == 1
    assert plan(batch=1, k_rows=100)["decode"]["ranges"] == 2  # tiles of 64


@pytest.mark.parametrize(
    ("size", "call"),
    [
        (8, {"batch": 1, "k_rows": 512}),
        (8, {"batch": 1, "k_rows": 1024}),  # 16 tiles: CTAs of 16 would have one each
        (16, {"batch": 1, "k_rows": 4096}),
        (16, {"batch": 1, "k_rows": 16_384, "paged": False}),
        (4, {"batch": 4, "k_rows": 4096}),  # 128 CTAs: larger clusters would not all run at once
        (2, {"batch": 8, "k_rows": 1024}),
        (2, {"batch": 8, "k_rows": 65_536, "paged": False}),
        (1, {"k_rows": 1024}),
        (1, {"left": 127, "right": 0, "d": 64, "dv": 64, "heads": 64, "operands": ("sinks",)}),
        (1, {"left": 1023, "right": 0}),
        (1, {"batch": 1024, "k_rows": 512}),
        (1, {"batch": 128, "heads": 64, "k_rows": 4096, "paged": False}),
        (2, {"d": 256, "dv": 256, "heads": 8, "kv_heads": 1, "paged": False}),
    ],
    ids=str,
)
def test_short_sequences_and_equal_ones_decode_in_clusters(size, call):
    chosen = plan(**call)
    assert (chosen["row"]["arch"], chosen["decode"]["ranges"]) == ("sm90", size)
    assert chosen["text"].count(f"in {size}-CTA clusters") == (size > 1)
    assert chosen["workspace"] == 0


@pytest.mark.parametrize(("size", "batch", "k_rows"), [(8, 1, 512), (4, 4, 4096), (1, 64, 1024)])
def test_packed_sequences_decode_in_clusters_too(size, batch, k_rows):
    """Those of up to four tokens, as they have three on average. A table has a row of slots for each sequence, so the
    keys are not divided by them."""
    chosen = plan(batch=batch, k_rows=k_rows, q_rows=3 * batch, varlen=True)
    assert (chosen["decode_row"]["arch"], chosen["row"]["pass"]) == ("sm90", "forward")
    assert chosen["decode"] == {"columns": 8, "ranges": size, "packed_rows": 16}
    assert chosen["workspace"] <= chosen["workspace_bound"]
    portable = plan(batch=batch, k_rows=k_rows, q_rows=3 * batch, varlen=True, page_size=4)
    assert (portable["row"]["arch"], portable["cluster_size"]) == ("sm80", 1)  # of the forward


@pytest.mark.parametrize(
    "options",
    [
        {"k_rows": 8192, "paged": True},  # long sequences, of which plan() does not know the lengths
        {"batch": 8, "k_rows": 65_536, "paged": True},
        {"batch": 1, "k_rows": 131_072},
        {"batch": 24, "heads": 24, "kv_heads": 24},  # 2.2 waves
        {"softcap": 30.0},
        {"operands": ("alibi_slopes",)},
        {"paged": True, "batch_invariant": True},
        {"paged": True, "num_splits": 2},
        {"paged": True, "float8": True},
        {"batch": 8, "k_rows": 65_536, "paged": True, "varlen": True},
        {"paged": True, "varlen": True, "batch_invariant": True},
        {"paged": True, "varlen": True, "batch": 4, "k_rows": 512, "q_rows": 0},
        {"dtype": "float32"},
        {"d": 96, "dv": 96},
        {"heads": 256},  # more rows than a tile's
    ],
    ids=str,
)
def test_other_decodes_take_equal_shares(options):
    chosen = plan(**{"batch": 64, "k_rows": 1024, "paged": False} | options)
    row = chosen.get("decode_row") or chosen["row"]
    assert (row["arch"], row["pass"]) != ("sm90", "decode")


@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("device", [H200, A10], ids=["H200", "A10"])
@pytest.mark.parametrize(("q_rows", "packed"), [(1, False), (7, False), (70, False), (3000, True)])
def test_batch_invariant_kernels_are_the_same_whatever_the_batch_and_the_tables(
    q_rows, packed, device, float8
):
    """The kernel and its tiles, which fix the order of a sequence's sums, must not depend on other sequences."""
    found = []
    for batch in (1, 8, 24, 500):
        for k_rows in (16, 100, 4096, 100_000):
            for page_size in (8, 16, 64):
                chosen = plan(
                    batch=batch, k_rows=k_rows, page_size=page_size, q_rows=q_rows, varlen=packed, float8=float8,
                    batch_invariant=True, device=device,
                )  # fmt: skip
                rows = {name: chosen.get("decode", {}).get(name) for name in ("columns", "packed_rows")}
                found.append((chosen["row"], chosen.get("decode_row"), rows))
    assert all(x == found[0] for x in found)


@pytest.mark.parametrize(
    "options",
    [
        {"batch": 8, "k_rows": 4096},
        {"batch": 8, "k_rows": 4096, "paged": False, "operands": ("kv_lengths",)},
        {"batch": 16, "k_rows": 8192},
        {"d": 256, "dv": 256, "heads": 8, "kv_heads": 1},
        {"d": 64, "dv": 64, "batch": 16},
    ],
    ids=str,
)
def test_long_sequences_are_clusters_where_the_device_finds_them_equal(options):
    """The kernel runs clusters if the lengths that the device reads are about equal. If not, the same CTAs take
    equal shares of all keys, so the workspace has room for two partial results per CTA."""
    chosen = plan(**options)
    grid, row = chosen["decode"], chosen["row"]
    assert (row["arch"], grid["ranges"]) == ("sm90", 2 * options.get("batch", 64))
    assert "in 2-CTA clusters" in chosen["text"]
    rows = 2 * grid["ranges"] * grid["columns"] * row["block_m"]
    assert rows * 4 * (row["dv"] + 2) <= chosen["workspace"] <= chosen["workspace_bound"]


def test_each_range_has_room_for_two_partial_results():
    """A range may end a sequence that an earlier range began, and begin one that a later range ends."""
    chosen = plan()
    grid, row = chosen["decode"], chosen["row"]
    rows = 2 * grid["ranges"] * grid["columns"] * row["block_m"]
    assert chosen["workspace"] >= rows * 4 * (row["dv"] + 2)  # o, m and l in float32


def test_every_row_fits_a_small_card():
    for d, dv in ((32, 32), (64, 64), (96, 96), (128, 128)):
        assert plan(A10, d=d, dv=dv)["row"]["pass"] == "decode"
        assert plan(A10, d=d, dv=dv)["shared"] <= A10["shared_memory"]


@pytest.mark.parametrize("seed", range(40))
def test_the_workspace_stays_within_its_bound(seed):
    rng = np.random.default_rng(seed)
    draw = lambda *choices: choices[rng.integers(len(choices))]  # noqa: E731
    b, leading, sq = int(draw(1, 3, 500)), int(draw(1, 2)), int(draw(1, 2, 7, 64, 65))
    hk, group, entries, size = (
        int(draw(1, 3, 8, 100)),
        int(draw(1, 4, 8, 12)),
        int(draw(1, 9)),
        int(draw(1, 64, 3000)),
    )
    splits, invariant, paged, d = (
        int(draw(0, 0, 1, 7, 10**6)),
        bool(rng.integers(2)),
        bool(rng.integers(2)),
        draw(64, 256),
    )
    splits, invariant = (splits, invariant) if paged else (0, False)
    packed = paged and bool(rng.integers(2))
    draft = int(draw(0, 1, 5, 16, 70)) if packed else 0
    layout = "paged_varlen" if packed else "paged" if paged else "fixed"
    names = ("draft_mask",) if draft else ()
    spec = AttentionSpec(layout, num_splits=splits, batch_invariant=invariant, operands=names)
    keys = (leading, 7, size, hk, d) if paged else (leading, b, entries * size, hk, d)
    shapes = {"query": (leading, b, sq, group * hk, d), "key": keys, "value": keys}
    shapes |= {"query": (leading, sq, group * hk, d), "cu_seqlens_q": (1, b + 1)} if packed else {}
    shapes |= {"block_tables": (leading, b, entries)} if paged else {}
    shapes |= {"draft_mask": (1, 1, draft, draft)} if draft else {}
    for device in (H200, A10):
        chosen = plan(
            device, leading=leading, batch=b, q_rows=sq, k_rows=entries * size, heads=group * hk, kv_heads=hk,
            d=d, dv=d, num_splits=splits, batch_invariant=invariant, paged=paged, varlen=packed,
            operands=names, draft_rows=draft,
        )  # fmt: skip
        assert chosen["workspace"] <= chosen["workspace_bound"]
        assert chosen["workspace_bound"] == workspace_bound("forward", spec, shapes)
