"""plan(): which row of the kernel table runs a call on a described GPU, its grid and its workspace. No GPU needed."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from plans import A100, H100, HEAD_DIMS, PASSES, RTX4090, T4, core, plan, tile

from jax_flash.spec import AttentionSpec
from jax_flash.workspace import mask_sizes, workspace_bound

SHAPE = ("d", "dv", "block_m", "block_n", "stages", "warps", "teams", "multicast", "blocks")


@pytest.mark.parametrize(
    ("head_dims", "row"),
    [
        ((64, 64), (64, 64)),
        ((8, 8), (32, 32)),
        ((64, 24), (64, 64)),
        ((72, 128), (128, 128)),
        ((24, 72), (96, 96)),
        ((160, 112), (192, 128)),
        ((160, 136), (192, 192)),
        ((224, 8), (256, 256)),
    ],
)
@pytest.mark.parametrize("pass_", PASSES)
def test_the_smallest_row_that_holds_both_head_dims_runs(pass_, head_dims, row):
    d, dv = head_dims
    chosen = plan(pass_, A100, d=d, dv=dv)["row"]
    assert (chosen["d"], chosen["dv"]) == row


def test_less_shared_memory_means_smaller_tiles():
    assert tile(plan(d=256, dv=256, dtype="float32")) == (64, 32)
    assert tile(plan(d=256, dv=256, dtype="float32", device=RTX4090)) == (32, 32)
    assert tile(plan("backward", d=256, dv=256, device=RTX4090)) == (32, 32)


@pytest.mark.parametrize(("d", "keys"), [(32, 64), (64, 64), (96, 64), (128, 32), (256, 32)])
def test_large_float32_tiles_need_work_for_every_sm(d, keys):
    call = {"d": d, "dv": d, "dtype": "float32"}
    small = tile(plan(**call, batch=1, q_rows=1024))
    assert small[0] == 64
    assert tile(plan(**call, batch=3, q_rows=1024)) == (128, keys)
    assert tile(plan(**call, batch=2, q_rows=1024)) == small  # 128 tiles, 132 SMs
    assert tile(plan(**call, batch=200, q_rows=64)) == small  # half of each tile would be padding
    assert tile(plan(**call, batch=200, q_rows=200 * 64, varlen=True)) == small
    assert tile(plan(**call, batch=3, q_rows=3 * 1024, varlen=True)) == (128, keys)
    assert tile(plan(**call, batch=3, q_rows=1024, operands=("bias",))) == small


@pytest.mark.parametrize("device", [H100, A100, RTX4090])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("head_dims", HEAD_DIMS)
@pytest.mark.parametrize("pass_", PASSES)
def test_every_row_fits_every_card(pass_, head_dims, dtype, device):
    d, dv = head_dims
    chosen = plan(pass_, dtype=dtype, d=d, dv=dv, device=device)
    assert dtype in chosen["row"]["dtypes"]
    assert chosen["shared"] <= device["shared_memory"]


@pytest.mark.parametrize("layout", [{}, {"paged": True}])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("head_dims", [dims for dims in HEAD_DIMS if dims <= (256, 256)])
@pytest.mark.parametrize("pass_", PASSES)
def test_turing_has_rows_of_its_own(pass_, head_dims, dtype, layout):
    d, dv = head_dims
    chosen = plan(pass_, dtype=dtype, d=d, dv=dv, device=T4, **(layout if pass_ == "forward" else {}))
    assert chosen["row"]["arch"] == "sm75"
    assert chosen["shared"] <= T4["shared_memory"]


def test_a_card_like_sm_90_runs_no_fallback():
    """A build for such cards alone leaves the fallback rows out."""
    table = Path(__file__).resolve().parent.parent / "csrc" / "kernels.def"
    if not table.exists():
        pytest.skip("the table lies in the source tree only")
    found = re.findall(
        r"^JF_FALLBACK\((\w+), *(\w+), *(\w+), *(\w+), *([\w |]+), *([\d, ]+), *[a-z_| ]+\)",
        table.read_text(),
        re.MULTILINE,
    )
    loaders = {"dense": ("dense",), "paged": ("paged",)}
    loaders |= dict.fromkeys(("both", "runtime"), ("dense", "paged"))
    fallbacks = {
        (arch, pass_, design, loaders[loader], element.split()[0], *map(int, numbers.split(",")))
        for arch, pass_, design, loader, element, numbers in found
    }
    assert fallbacks
    calls = [{"pass_": name} for name in PASSES]
    calls += [{"paged": True}, {"paged": True, "q_rows": 1}, {"paged": True, "q_rows": 4}]
    for call in calls:
        for group, dtype in (("half", "bfloat16"), ("single", "float32")):
            for d, dv in HEAD_DIMS:
                row = plan(**call, dtype=dtype, d=d, dv=dv)["row"]
                sizes = (row[name] for name in SHAPE)
                assert (
                    row["arch"],
                    row["pass"],
                    row["design"],
                    row["loaders"],
                    group,
                    *sizes,
                ) not in fallbacks


def test_newer_cards_leave_turings_rows_alone():
    for device in (A100, RTX4090, H100):
        assert all(plan(name, device, dtype="float16")["row"]["arch"] != "sm75" for name in PASSES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d": 60}, "head dims 60 and 64 on CUDA, which takes multiples of 8; pad them"),
        (
            {"d": 512, "dtype": "float16", **T4},
            "no CUDA kernel .*forward of float16 with d=512.* on sm_75 with 65536 .*built: .*sm80 d=192 dv=128.*xla",
        ),
        *(
            ({"pass_": name, "d": 576, "dv": 512}, f"no CUDA kernel .*{name} of bfloat16 with d=576, dv=512")
            # These would take the gathered keys of a latent pool.
            for name in ("backward", "bias_gradient", "tangent")
        ),
        (
            {"capability": 75},
            'query is bfloat16, which sm_75 has no products of.*implementation="xla" runs it',
        ),
        ({"capability": 70, "dtype": "float16"}, 'with d=64, dv=64 on sm_70.*implementation="xla" runs it'),
        ({"shared_memory": 1000}, "1000 bytes of shared memory"),
        (
            {"batch": 2**20, "q_rows": 2**20, "heads": 4},
            "tiles in one call, more than 2.*31.*split the batch",
        ),
    ],
)
def test_what_cannot_run_says_why_and_the_way_out(options, message):
    with pytest.raises(RuntimeError, match=message):
        plan(**options)


def test_an_unknown_pass_or_dtype_is_named():
    with pytest.raises(ValueError, match="upward is not one of forward, backward, bias_gradient"):
        plan("upward")
    with pytest.raises(ValueError, match="float64 is not one of"):
        plan(dtype="float64")


def test_a_block_per_tile_and_head():
    forward = plan(device=A100, q_rows=1000)
    assert forward["queries"] == {"block": 128, "tiles": 8, "blocks": 8 * 8 * 2}
    backward = plan("backward", k_rows=1500, leading=3, heads=2)
    block = backward["keys"]["block"]
    assert backward["keys"]["blocks"] == math.ceil(1500 / block) * 2 * 2 * 3  # KV heads × batch × leading
    assert backward["queries"]["blocks"] == 0


def test_a_block_per_tile_of_the_bias():
    chosen = plan("bias_gradient", bias=(1, 8, 1000, 1500), leading=2)
    rows, columns = (math.ceil(n / block) for n, block in zip((1000, 1500), tile(chosen), strict=True))
    assert chosen["queries"]["blocks"] == 2 * 8 * rows * columns
    assert plan("bias_gradient", bias=(2, 1, 1, 1))["queries"]["blocks"] == 2


def test_options_that_change_scores_take_the_general_kernel():
    assert not plan()["general"]
    assert not plan(operands=("q_lengths", "kv_lengths", "sinks"))["general"]
    for name in ("mask", "bias", "alibi_slopes", "dropout", "q_segment_ids", "ranges"):
        assert plan(operands=(name,))["general"]
    assert plan(softcap=3.0)["general"]
    assert plan(scale=-1.0)["general"]


def test_nothing_to_do_is_no_block():
    assert plan(q_rows=0)["queries"]["blocks"] == 0
    assert plan("backward", k_rows=0)["keys"]["blocks"] == 0
    assert plan("bias_gradient", bias=(1, 1, 0, 5))["queries"]["blocks"] == 0


def test_a_repeatable_backward_has_a_kernel_over_queries_instead_of_an_accumulator():
    fast, repeatable = (plan("backward", device=A100, deterministic=x) for x in (False, True))
    assert fast["workspace"] >= 4 * 2 * 1000 * 8 * 64
    assert repeatable["workspace"] == 0
    assert repeatable["queries"]["blocks"] > 0


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("pass_", ["forward", "backward", "tangent"])
@pytest.mark.parametrize(
    ("names", "packed"),
    [(("q_segment_ids", "kv_segment_ids"), False), (("ranges",), False), (("ranges",), True)],
)
def test_tiles_of_segments_and_ranges_have_a_slot_each(names, packed, pass_, deterministic):
    """An interval and a flag, and with ranges another interval, which is a gap."""
    sizes = {"device": A100, "batch": 3, "leading": 5, "deterministic": deterministic, "varlen": packed}
    without = plan(pass_, softcap=3.0, **sizes)
    chosen = plan(pass_, operands=names, **sizes)
    # Per head: 8 query heads, 2 KV heads. A schedule of packed sequences has two more tiles for each leading entry.
    tiles = [chosen["queries"]["blocks"] // 8, chosen["keys"]["blocks"] // 2]
    bytes_of_slot = 20 if names == ("ranges",) else 12
    slots = [n - 2 * 5 if packed and n else n for n in tiles]
    aligned = sum(-(-bytes_of_slot * n // 256) * 256 for n in slots)
    assert chosen["workspace"] - without["workspace"] == aligned > 0
    assert (tiles[1] > 0) == (pass_ == "backward")


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("seed", range(30))
def test_the_workspace_stays_within_its_bound(pass_, seed):
    """The bound holds on every device."""
    rng = np.random.default_rng(seed)
    draw = lambda *choices: choices[rng.integers(len(choices))]  # noqa: E731
    packed, deterministic, leading = bool(rng.integers(2)), bool(rng.integers(2)), draw((1,), (3,), (2, 3))
    b, sq, sk = int(draw(1, 2, 700)), int(draw(0, 1, 31, 4097)), int(draw(0, 1, 65, 9000))
    d, dv = draw(*HEAD_DIMS)
    fixed = () if packed else (("q_segment_ids", "kv_segment_ids"), ("block_mask",), ("mask",))
    present = draw((), ("ranges",), *fixed)
    block = draw((128, 128), (64, 32)) if "block_mask" in present else (0, 0)
    layout = "varlen" if packed else "fixed"
    spec = AttentionSpec(layout, deterministic=deterministic, operands=present, block=block)
    rows = [(*leading, x) if packed else (*leading, b, x) for x in (sq, sk)]
    shapes = {"query": (*rows[0], 4, d), "key": (*rows[1], 2, d), "value": (*rows[1], 2, dv)}
    if packed:
        shapes |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), (*(1 for _ in leading), b + 1))
    if "mask" in present:
        shapes["mask"] = tuple(draw(1, full) for full in (*leading, b, 4, sq, sk))
    bound = workspace_bound(pass_, spec, shapes)
    mask = mask_sizes(shapes, len(leading), math.prod(leading))
    for device in (H100, A100, RTX4090):
        chosen = plan(
            pass_, device, varlen=packed, deterministic=deterministic, leading=math.prod(leading), batch=b,
            q_rows=sq, k_rows=sk, heads=4, kv_heads=2, d=d, dv=dv, operands=present, block=block, mask=mask,
        )  # fmt: skip
        assert chosen["workspace"] <= chosen["workspace_bound"] == bound


@pytest.mark.parametrize(("leading", "b", "heads"), [(1, 1, 1), (1, 2, 1), (3, 1, 4)])
@pytest.mark.parametrize(("rows", "keys"), [(1, 9000), (4097, 1), (4097, 9000)])
def test_a_boolean_mask_takes_an_eighth_of_it_as_bits(leading, b, heads, rows, keys):
    """Each 64 × 64 elements take 512 bytes, once for those that it shares."""
    shapes = {"query": (3, 2, 4097, 4, 64), "key": (3, 2, 9000, 2, 64), "value": (3, 2, 9000, 2, 64)}
    shapes["mask"] = (leading, b, heads, rows, keys)
    mask = mask_sizes(shapes, 1, 3)
    bits = leading * b * heads * -(-rows // 64) * -(-keys // 64) * 512
    sizes = dict(batch=2, leading=3, q_rows=4097, k_rows=9000, heads=4, kv_heads=2, d=64, dv=64, mask=mask)
    for options in ({}, {"softcap": 2.0}):
        chosen = plan("forward", H100, operands=("mask",), **sizes, **options)
        none = plan("forward", H100, operands=("mask",), **sizes | {"mask": (0, *mask[1:])}, **options)
        spec = AttentionSpec("fixed", operands=("mask",), **options)
        assert chosen["score"] == ("general" if options else "listed_mask")
        assert chosen["workspace"] - none["workspace"] == bits
        assert chosen["workspace_bound"] - none["workspace_bound"] == bits
        assert chosen["workspace"] <= chosen["workspace_bound"] == workspace_bound("forward", spec, shapes)


@pytest.mark.parametrize(("pass_", "side"), [("forward", "queries"), ("backward", "keys")])
@pytest.mark.parametrize("sequences", [0, 1, 2, 7])
@pytest.mark.parametrize("rows", [0, 1, 5, 127, 1000, 1003])
def test_a_schedule_has_room_for_any_packing(rows, sequences, pass_, side):
    """The bound of tiles is reached if every sequence, and the tokens before and after all sequences, has one row more
    than whole tiles."""
    for device in (H100, A100):
        chosen = plan(pass_, device, varlen=True, batch=sequences, q_rows=rows, k_rows=rows)[side]
        if rows == 0:
            assert chosen["tiles"] == 0
            continue
        most = max((rows - n) // chosen["block"] + n for n in range(1, min(sequences + 2, rows) + 1))
        assert chosen["tiles"] >= most


def test_the_plan_in_words():
    assert plan(device=A100, d=128, dv=128)["text"].startswith(
        "sm80 forward dense|paged plain d=128 dv=128 tile 128x64, 128 query tiles"
    )
    assert plan(d=128, dv=128, batch=9)["text"].startswith(
        "sm90 forward dense plain d=128 dv=128 tile 128x128, 576 query tiles on 132 persistent CTAs"
    )


@pytest.mark.parametrize("capability", [75, 80, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_append_has_rows_for_every_card_and_dtype(dtype, capability):
    rows = [row for row in core.kernel_table() if row["pass"] == "append" and dtype in row["dtypes"]]
    designs = {row["design"] for row in rows if core.covers(row["arch"], capability)}
    assert designs == {"tokens", "dynamic"} | ({"bulk"} if capability >= 90 else set())
