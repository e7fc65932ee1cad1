"""What plan() chooses for ranges, block masks and boolean masks. No GPU needed."""

from __future__ import annotations

from typing import Any

import pytest
from plans import A100, T4, plan


@pytest.mark.parametrize("d", [64, 128, 256])
def test_ranges_alone_have_a_forward(d):
    for options in ({}, {"right": 0}, {"varlen": True}, {"dtype": "float16", "leading": 3}):
        chosen = plan(d=d, dv=d, operands=("ranges",), **options)
        assert chosen["text"].startswith(f"sm90 forward dense ranges d={d} dv={d} tile ")
    for options in ({"scale": -1.0}, {"softcap": 3.0}, {"operands": ("ranges", "alibi_slopes")}):
        assert plan(d=d, dv=d, **{"operands": ("ranges",)} | options)["score"] == "general"
    assert plan(d=d - 8, dv=d - 8, operands=("ranges",))["score"] == "ranges"


@pytest.mark.parametrize("d", [64, 128, 256, 512])
def test_ranges_alone_have_a_backward(d):
    for options in (
        {},
        {"right": 0},
        {"varlen": True},
        {"deterministic": True},
        {"leading": 6, "leading_rank": 2},
    ):
        chosen = plan("backward", d=d, dv=d, operands=("ranges",), **options)
        assert chosen["text"].startswith(f"sm90 backward dense ranges d={d} dv={d} tile ")
    for options in ({"scale": -1.0}, {"softcap": 3.0}, {"operands": ("ranges", "alibi_slopes")}):
        assert plan("backward", d=d, dv=d, **{"operands": ("ranges",)} | options)["score"] == "general"
    assert plan("backward", d=192, dv=d if d == 128 else 192, operands=("ranges",))["score"] == "general"


def test_ranges_of_other_head_dims_run_the_general_forward():
    for d, dv in ((32, 32), (96, 96), (192, 128), (192, 192)):
        assert plan(d=d, dv=dv, operands=("ranges",))["score"] == "general"
    assert plan(operands=("ranges",), dtype="float32")["score"] == "general"


def test_ranges_take_memory_for_each_block_and_each_tile():
    fixed = plan(operands=("ranges",))
    blocks, tiles = 2 * 16 * 32, 2 * 6 * 16  # of 64 and 192 rows, in both batch entries
    assert fixed["workspace"] == -(-(blocks + tiles) // 256) * 256
    three: dict[str, Any] = {"batch": 3, "heads": 2}
    plain, ranges = plan("backward", **three), plan("backward", operands=("ranges",), **three)
    blocks, tiles = 3 * 16 * 32, 3 * 12 * 16  # of 64 query rows and of 128 keys
    counter = 256 if ranges["persistent_ctas"] < ranges["keys"]["blocks"] else 0
    assert ranges["workspace"] - plain["workspace"] == -(-(blocks + tiles) // 256) * 256 + counter


@pytest.mark.parametrize("pass_", ["forward", "backward"])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_block_masks_alone_have_kernels(d, pass_):
    blocks = {"operands": ("block_mask",), "block": (128, 128), "d": d, "dv": d}
    for options in ({}, {"right": 0}, {"dtype": "float16", "leading": 3}, {"block": (16, 32)}):
        chosen = plan(pass_, **blocks | options)
        assert chosen["text"].startswith(f"sm90 {pass_} dense blocks d={d} dv={d} tile ")
    others = [
        {"varlen": True},
        {"block": (128, 48)},
        {"scale": -1.0},
        {"operands": ("block_mask", "position")},
    ]
    for options in others + [{"deterministic": True}] * (pass_ == "backward"):
        assert plan(pass_, **blocks | options)["row"]["arch"] == "sm80"
    assert plan(pass_, **blocks | {"d": 512, "dv": 512})["row"]["arch"] == "sm80"


@pytest.mark.parametrize("pass_", ["forward", "backward"])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_the_tiles_of_a_boolean_mask_alone_are_listed(d, pass_):
    mask = {"operands": ("mask",), "d": d, "dv": d}
    more = {"operands": ("mask", "sinks", "kv_lengths"), "leading": 3}
    for options in ({}, {"right": 0}, {"left": 9, "mask_in_chunks": True}, {"dtype": "float16"}, more):
        chosen = plan(pass_, **mask | options)
        assert chosen["text"].startswith(f"sm90 {pass_} dense listed_mask d={d} dv={d} tile ")
        assert 0 < chosen["workspace"] <= chosen["workspace_bound"]
    others = [
        {"softcap": 3.0},
        {"scale": -1.0},
        {"operands": ("mask", "alibi_slopes")},
        {"operands": ("mask", "position")},
    ]
    for options in others + [{"deterministic": True}] * (pass_ == "backward"):
        assert plan(pass_, **mask | options)["score"] in ("general", "mask")
    assert plan(pass_, **mask, device=A100)["score"] == "general"


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("pass_", ["forward", "backward"])
@pytest.mark.parametrize("device", [A100, T4])
def test_portable_kernels_take_a_byte_for_each_tile_of_a_boolean_mask(device, pass_, deterministic):
    sizes = {"device": device, "dtype": "float16", "deterministic": deterministic, "leading": 3}
    without = plan(pass_, operands=("bias",), **sizes)
    for options in ({}, {"softcap": 3.0}, {"operands": ("mask", "bias", "dropout")}):
        chosen = plan(pass_, **sizes | {"operands": ("mask",)} | options)
        tiles = 3 * 2 * 8 * 16 * 24  # of 64 rows and keys, at each head of the batch and leading entries
        assert chosen["workspace"] - without["workspace"] == tiles == -(-tiles // 256) * 256
        assert chosen["workspace"] <= chosen["workspace_bound"]


@pytest.mark.parametrize(("d", "rows", "fewest"), [(64, 128, 64), (128, 64, 128), (256, 64, 64)])
def test_key_tiles_are_as_small_as_blocks(d, rows, fewest):
    blocks = {"operands": ("block_mask",), "d": d, "dv": d, "batch": 4, "k_rows": 4096, "q_rows": 4096}
    for block in ((128, 128), (64, 128), (128, 64), (32, 96)):
        keys = 128 if block[0] % rows == 0 and block[1] % 128 == 0 else fewest
        chosen = plan("backward", **blocks, block=block)
        assert (chosen["row"]["block_n"], chosen["keys"]["block"]) == (keys, keys)
        assert chosen["row"]["block_m"] == (64 if keys == 64 else rows)
        ctas = 2 if keys == 64 and d == 64 else 1  # of an SM
        assert chosen["persistent_ctas"] == 132 * ctas
        assert chosen["cluster_size"] == (2 if keys == 128 and d == 256 else 1)
        assert 0 < chosen["workspace"] <= chosen["workspace_bound"]


def test_query_tiles_of_small_blocks_have_rows_of_two_heads():
    blocks = {"operands": ("block_mask",), "d": 128, "dv": 128, "batch": 1, "q_rows": 1000}
    of_one = plan(block=(128, 64), **blocks)["queries"]
    assert (of_one["block"], of_one["tiles"], of_one["blocks"]) == (128, 8, 8 * 8)
    of_two = plan(block=(64, 64), **blocks)["queries"]
    assert (of_two["block"], of_two["tiles"], of_two["blocks"]) == (64, 16, 16 * 4)
    alone = plan(block=(64, 64), **blocks | {"heads": 6})["queries"]  # each KV head has three query heads
    assert (alone["block"], alone["blocks"]) == (128, 8 * 6)


@pytest.mark.parametrize(
    ("block", "heads", "rows", "tiles"),
    [
        ((128, 128), 32, 192, 8 * 3 * 8),  # 8 parts of 64 rows in 3 tiles
        ((256, 64), 64, 192, 8 * 6 * 8),
        ((64, 64), 24, 192, 8 * 16),  # one tile for the same rows of three heads
        ((64, 64), 32, 128, 8 * 2 * 16),
        ((128, 128), 16, 128, 8 * 2 * 8),
        ((128, 32), 32, 128, 8 * 4 * 8),
        ((96, 128), 32, 128, 8 * 2 * 16),
    ],
)
def test_three_consumers_take_rows_of_all_heads_of_a_kv_head(block, heads, rows, tiles):
    """At d64, where these tiles leave at most one consumer of nine idle."""
    chosen = plan(
        operands=("block_mask",), d=64, dv=64, batch=1, q_rows=1000, heads=heads, kv_heads=8, block=block
    )
    assert (chosen["row"]["block_m"], chosen["queries"]["blocks"]) == (rows, tiles)
    assert chosen["workspace"] <= chosen["workspace_bound"]


def test_what_segments_leave_to_query_tiles_is_found_before_the_forward_runs():
    sizes = {"d": 128, "dv": 128, "batch": 3, "leading": 5}
    segments, without = (
        plan(**sizes, operands=("q_segment_ids", "kv_segment_ids")),
        plan(**sizes, softcap=1e4),
    )
    tiles = segments["queries"]["blocks"] // 8  # of all heads
    assert segments["queries"]["block"] == 128
    both = tiles + 2 * tiles  # for the 64 rows of each consumer, too
    assert segments["workspace"] - without["workspace"] == -(-12 * both // 256) * 256 > 0
