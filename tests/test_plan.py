"""plan(): which row of the kernel table runs a call on a described GPU, its grid and its workspace. No GPU needed."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import CASES, make_inputs, spec

from jax_flash.__main__ import main
from jax_flash.operands import operand_bits
from jax_flash.spec import AttentionSpec
from jax_flash.workspace import workspace_bound

core = pytest.importorskip("jax_flash._core")

H100 = {"capability": 90, "sm_count": 132, "shared_memory": 232_448}
A100 = {"capability": 80, "sm_count": 108, "shared_memory": 166_912}
T4 = {"capability": 75, "sm_count": 40, "shared_memory": 65_536}
RTX4090 = {"capability": 89, "sm_count": 128, "shared_memory": 101_376}
HEAD_DIMS = ((32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
PASSES = ("forward", "backward", "bias_gradient")


def plan(pass_: str = "forward", device: dict[str, int] = H100, **options: Any) -> dict[str, Any]:
    defaults = {"dtype": "bfloat16", "batch": 2, "q_rows": 1000, "k_rows": 1500, "heads": 8, "kv_heads": 2}
    return core.plan(pass_=pass_, **defaults | {"d": 64, "dv": 64} | device | options)


def tile(chosen: dict[str, Any]) -> tuple[int, int]:
    return chosen["row"]["block_m"], chosen["row"]["block_n"]


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
@pytest.mark.parametrize("head_dims", HEAD_DIMS)
@pytest.mark.parametrize("pass_", PASSES)
def test_turing_has_rows_of_its_own(pass_, head_dims, dtype, layout):
    d, dv = head_dims
    chosen = plan(pass_, dtype=dtype, d=d, dv=dv, device=T4, **(layout if pass_ == "forward" else {}))
    assert chosen["row"]["arch"] == "sm75"
    assert chosen["shared"] <= T4["shared_memory"]


def test_a_card_like_sm_90_runs_no_fallback():
    """Builds for such cards alone leave the fallbacks out."""
    table = Path(__file__).resolve().parent.parent / "csrc" / "kernels.def"
    if not table.exists():
        pytest.skip("the table lies in the source tree only")
    found = re.findall(r"^JF_FALLBACK\((\w+), *(\w+), *(\w+), *(.*)\)", table.read_text(), re.MULTILINE)
    fallbacks = {(*names, *map(int, numbers.split(","))) for *names, numbers in found}
    assert fallbacks
    calls = [{"pass_": name} for name in PASSES]
    calls += [{"paged": True}, {"paged": True, "q_rows": 1}, {"paged": True, "q_rows": 4}]
    for call in calls:
        for group, dtype in (("half", "bfloat16"), ("single", "float32")):
            for d, dv in HEAD_DIMS:
                row = plan(**call, dtype=dtype, d=d, dv=dv)["row"]
                sizes = (row[name] for name in ("d", "dv", "block_m", "block_n", "stages", "warps", "blocks"))
                assert (row["arch"], row["pass"], group, *sizes) not in fallbacks


def test_newer_cards_leave_turings_rows_alone():
    for device in (A100, RTX4090, H100):
        assert all(plan(name, device, dtype="float16")["row"]["arch"] != "sm75" for name in PASSES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d": 60}, "head dims 60 and 64 on CUDA, which takes multiples of 8; pad them"),
        (
            {"d": 512},
            "no CUDA kernel .*forward of bfloat16 with d=512.* on sm_90.*built: sm80 d=32, .*sm80 d=192 dv=128.*xla",
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
    backward = plan("backward", k_rows=1500, leading=3)
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
    assert not plan(operands=operand_bits(("q_lengths", "kv_lengths", "sinks")))["general"]
    for name in ("mask", "bias", "alibi_slopes", "dropout", "q_segment_ids"):
        assert plan(operands=operand_bits((name,)))["general"]
    assert plan(softcap=3.0)["general"]
    assert plan(scale=-1.0)["general"]


def test_nothing_to_do_is_no_block():
    assert plan(q_rows=0)["queries"]["blocks"] == 0
    assert plan("backward", k_rows=0)["keys"]["blocks"] == 0
    assert plan("bias_gradient", bias=(1, 1, 0, 5))["queries"]["blocks"] == 0


def test_a_repeatable_backward_has_a_kernel_over_queries_instead_of_an_accumulator():
    fast, repeatable = plan("backward"), plan("backward", deterministic=True)
    assert fast["workspace"] >= 4 * 2 * 1000 * 8 * 64
    assert repeatable["workspace"] == 0
    assert repeatable["queries"]["blocks"] > 0


@pytest.mark.parametrize("pass_", PASSES[:2])
@pytest.mark.parametrize("seed", range(30))
def test_the_workspace_stays_within_its_bound(pass_, seed):
    """plan.cc's bound is workspace.py's, and holds on every device."""
    rng = np.random.default_rng(seed)
    draw = lambda *choices: choices[rng.integers(len(choices))]  # noqa: E731
    packed, deterministic, leading = bool(rng.integers(2)), bool(rng.integers(2)), int(draw(1, 3))
    b, sq, sk = int(draw(1, 2, 700)), int(draw(0, 1, 31, 4097)), int(draw(0, 1, 65, 9000))
    d, dv = draw(*HEAD_DIMS)
    spec = AttentionSpec("varlen" if packed else "fixed", deterministic=deterministic)
    rows = ((leading, sq), (leading, sk)) if packed else ((leading, b, sq), (leading, b, sk))
    shapes = {"query": (*rows[0], 4, d), "key": (*rows[1], 2, d), "value": (*rows[1], 2, dv)}
    if packed:
        shapes |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), (1, b + 1))
    bound = workspace_bound(pass_, spec, shapes)
    for device in (H100, A100, RTX4090):
        chosen = plan(
            pass_, device, varlen=packed, deterministic=deterministic, leading=leading, batch=b,
            q_rows=sq, k_rows=sk, heads=4, kv_heads=2, d=d, dv=dv,
        )  # fmt: skip
        assert chosen["workspace"] <= chosen["workspace_bound"] == bound


def test_the_plan_in_words():
    assert plan(device=A100, d=128, dv=128)["text"].startswith(
        "sm80 forward plain d=128 dv=128 tile 128x64, 128 blocks of queries"
    )
    assert plan(d=128, dv=128, batch=9)["text"].startswith(
        "sm90 forward plain d=128 dv=128 tile 128x128, 576 tiles of queries for 132 blocks"
    )


def arch(**options: Any) -> str:
    return plan(**options)["row"]["arch"]


def test_hopper_has_a_forward_of_its_own():
    for d, dv in HEAD_DIMS:
        assert arch(d=d, dv=dv) == arch(d=d, dv=dv, dtype="float16", varlen=True, leading=3) == "sm90"
        for name in ("bias", "mask", "alibi_slopes", "dropout", "q_segment_ids"):
            assert arch(d=d, dv=dv, operands=operand_bits((name,))) == "sm90"
        assert arch(d=d, dv=dv, dtype="float32") == arch(d=d, dv=dv, device=A100) == "sm80"
    assert arch(pass_="backward") == "sm80"


def test_hopper_takes_more_keys_at_a_time_where_a_row_sees_many():
    sizes = {"d": 128, "dv": 128, "q_rows": 4096, "k_rows": 4096}
    assert (
        tile(plan(**sizes))
        == tile(plan(right=0, **sizes))
        == tile(plan(left=2048, right=0, **sizes))
        == (128, 160)
    )
    assert tile(plan(d=128, dv=128, q_rows=4096, k_rows=1024)) == (128, 128)
    assert tile(plan(left=1024, right=0, **sizes)) == (128, 128)
    assert tile(plan(softcap=3.0, **sizes)) == (128, 128)  # no registers are left for an option
    assert tile(plan(varlen=True, batch=2, **sizes)) == (128, 160)
    assert tile(plan(varlen=True, batch=4, **sizes)) == (128, 128)  # sequences of 1,024 on average


def test_hopper_takes_fewer_queries_at_a_time_where_they_are_few():
    def rows(d: int = 128, **options: Any) -> int:
        return tile(plan(d=d, dv=d, heads=16, kv_heads=16, **options))[0]

    few, many = {"batch": 1, "q_rows": 512, "k_rows": 512}, {"batch": 1, "q_rows": 1024, "k_rows": 1024}
    assert rows(**few) == rows(d=64, **few) == rows(right=0, **few) == rows(varlen=True, **few) == 64
    assert rows(**many) == 128
    assert rows(d=64, **many) == 128  # of teams
    assert rows(d=64, **many | {"batch": 16}) == 192
    assert rows(**few | {"k_rows": 16384}) == 64
    assert rows(**few | {"batch": 2}) == rows(leading=2, **few) == 128
    assert rows(softcap=3.0, **few) == 128  # has no such kernel


def test_hopper_has_teams_where_rows_see_few_keys():
    def teams(keys: int, **options: Any) -> bool:
        return " blocks of 2 teams" in plan(**{"q_rows": keys, "k_rows": keys, "batch": 16} | options)["text"]

    assert teams(1024, right=0)
    assert teams(16384, left=1024, right=0)
    assert teams(256)
    assert teams(8192, varlen=True, right=0)  # sequences of 512 on average
    assert not teams(2048, right=0)
    assert not teams(16384, left=1025, right=0)
    assert not teams(768)
    assert not teams(1024, right=0, softcap=3.0)  # has no such kernel
    assert not teams(1024, right=0, d=128, dv=128)
    assert not teams(1024, right=0, d=32, dv=32)
    assert not teams(512, right=0, batch=1)  # few queries have tiles of their own


def test_hopper_has_teams_where_large_tiles_leave_more_of_the_last_round_idle():
    def teams(keys: int, batch: int, **options: Any) -> bool:
        sizes = {"q_rows": keys, "k_rows": keys, "batch": batch, "heads": 16, "kv_heads": 16}
        return " blocks of 2 teams" in plan(**sizes | options)["text"]

    assert teams(1024, 1)  # 128 tiles, or 96 large ones, for 132 multiprocessors
    assert teams(1024, 2)  # 256, or 192
    assert teams(512, 8)  # 512, or 384
    assert not teams(768, 4)  # 384, or 256
    assert teams(1024, 10)  # 8 rounds of large tiles
    assert not teams(1024, 12)  # 9
    assert not teams(512, 8, operands=operand_bits(("kv_lengths",)))  # tiles are not as long as each other
    assert teams(1024, 2, operands=operand_bits(("kv_lengths",)))  # but all have a team at once
    assert teams(2048, 1, right=0)
    assert not teams(2048, 2, right=0)
    assert not teams(8192, 8, varlen=True)


def test_teams_share_tiles_out():
    def of_heads(heads: int, **options: Any) -> dict[str, Any]:
        return plan(q_rows=140, k_rows=140, heads=heads, kv_heads=1, batch=1, **options)

    counter = 256  # bytes of workspace
    few, many = of_heads(132, right=0), of_heads(136, right=0)  # of two tiles each
    assert tile(few) == tile(many) == (128, 64)
    assert "264 tiles of queries for 132 blocks of 2 teams" in few["text"]
    assert (few["workspace"], many["workspace"]) == (0, counter)
    assert few["shared"] == 2 * (2 * (128 * 64 + 3 * 64 * (64 + 64)) + 2048)
    equal = plan(q_rows=128, k_rows=100, heads=272, kv_heads=4, batch=1)
    assert (tile(equal), equal["workspace"]) == ((128, 64), 0)


def test_the_contracts_cases_reach_every_tile_of_hoppers_plain_forward():
    reached = set()
    for case in CASES:
        inputs = make_inputs(case)
        of_case, packed = spec(case, inputs), case.layout == "varlen"
        query, key = inputs.positional["query"], inputs.positional["key"]
        chosen = plan(
            varlen=packed, batch=len(case.q_sequences) if packed else case.b, q_rows=query.shape[-3],
            k_rows=key.shape[-3], heads=case.hq, kv_heads=case.hk, d=case.d + -case.d % 8,
            dv=case.dv + -case.dv % 8, left=of_case.left, right=of_case.right, softcap=of_case.softcap,
            operands=operand_bits(of_case.operands),
        )  # fmt: skip
        if "sm90 forward plain" in chosen["text"]:
            of = chosen["row"]["d"], *tile(chosen)
            takers = 132 * (2 if " teams" in chosen["text"] else 1)
            reached.add(of)
            if chosen["queries"]["blocks"] > takers:  # one at least has a tile after another
                reached.add((*of, "by a counter" if chosen["workspace"] else "in turn"))
    assert reached >= {(64, 64, 128), (128, 64, 128), (128, 128, 160), (256, 128, 80)}
    assert reached >= {(64, 128, 64, how) for how in ("by a counter", "in turn")}  # of teams
    assert reached >= {
        (64, 192, 128, "in turn"),
        (32, 192, 128, "by a counter"),
        (128, 128, 128, "by a counter"),
    }


def test_hoppers_blocks_work_in_pairs_where_a_head_has_many_keys():
    def pairs(rows: int, keys: int, d: int = 128, **options: Any) -> bool:
        return "blocks in pairs" in plan(d=d, dv=d, q_rows=rows, k_rows=keys, **options)["text"]

    assert pairs(8192, 8192)
    assert pairs(8192, 8192, right=0)
    assert pairs(4096, 4096, d=256)
    assert not pairs(4096, 4096)
    assert not pairs(8192, 8192, left=4096, right=0)
    assert not pairs(8192, 8192, d=192)  # has no such kernel
    assert not pairs(8192, 8192, softcap=3.0)
    assert not pairs(8192, 8192, varlen=True)
    assert not pairs(300, 8192)
    assert pairs(17 * 128, 8192)
    assert "for 16 blocks in pairs" in plan(d=256, dv=256, batch=1, q_rows=256, k_rows=8192)["text"]
    odd = plan(device=H100 | {"sm_count": 133}, d=128, dv=128, q_rows=8192, k_rows=8192)
    assert "for 132 blocks in pairs" in odd["text"]


def test_hopper_copies_pages_by_groups_of_eight_rows():
    pages = {"paged": True, "d": 128, "dv": 128}
    assert (
        arch(page_size=8, **pages) == arch(page_size=48, **pages) == arch(page_size=1024, **pages) == "sm90"
    )
    assert arch(page_size=4, **pages) == arch(page_size=12, **pages) == "sm80"
    assert arch(page_size=16, float8=True, **pages) == "sm80"


def test_three_consumers_have_registers_for_one_option_of_the_score():
    for names in (("alibi_slopes",), ("q_segment_ids", "kv_segment_ids"), ("dropout",)):
        assert tile(plan(d=64, dv=64, operands=operand_bits(names)))[0] == 192
    assert tile(plan(d=64, dv=64, softcap=3.0))[0] == 192
    assert tile(plan(d=64, dv=64, softcap=3.0, operands=operand_bits(("alibi_slopes",))))[0] == 128
    assert tile(plan(d=64, dv=64, operands=operand_bits(("alibi_slopes", "dropout"))))[0] == 128
    assert tile(plan(d=64, dv=64, operands=operand_bits(("mask",))))[0] == 128
    assert tile(plan(d=64, dv=64, scale=-1.0))[0] == 128


@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        ({}, "plain"),
        ({"operands": operand_bits(("alibi_slopes",))}, "alibi"),
        ({"operands": operand_bits(("q_segment_ids", "kv_segment_ids"))}, "segments"),
        ({"operands": operand_bits(("dropout",))}, "dropout"),
        ({"softcap": 30.0}, "softcap"),
        ({"softcap": 1e4}, "general"),  # its powers of e are not float32's
        ({"softcap": 30.0, "operands": operand_bits(("dropout",))}, "general"),
        ({"operands": operand_bits(("mask",))}, "general"),
    ],
)
def test_one_option_of_the_score_has_a_kernel_of_its_own_on_hopper(options, kernel):
    assert plan(d=128, dv=128, **options)["text"].split()[2] == kernel
    others = kernel if kernel in ("plain", "dropout") else "general"
    assert plan(d=128, dv=128, device=A100, **options)["text"].split()[2] == others


def test_blocks_that_stay_count_tiles_of_unequal_length():
    assert plan(d=128, dv=128, batch=9, q_rows=1024)["workspace"] == 0
    assert plan(d=128, dv=128, batch=9, q_rows=1000)["workspace"] == 256  # the last tile of a head is shorter
    assert plan(d=128, dv=128, batch=1, q_rows=1000)["workspace"] == 0  # 64 tiles for 132 multiprocessors


COMMAND = ["plan", "--batch", "2", "--seqlen", "4096", "--heads", "16", "--head-dim", "128"]


def test_the_command_prints_a_line_per_pass(capsys):
    assert main([*COMMAND, "--gpu", "a100", "--bias", "--softcap", "30"]) == 0
    gpu, *lines = capsys.readouterr().out.splitlines()
    assert gpu == "NVIDIA A100: sm_80, 108 multiprocessors, 166912 bytes shared"
    assert [line.split()[1:3] for line in lines] == [[name, "general"] for name in PASSES]
    forward = plan(device=A100, batch=2, q_rows=4096, k_rows=4096, heads=16, kv_heads=16, d=128, dv=128)
    assert f"tile {tile(forward)[0]}x{tile(forward)[1]}" in lines[0]
    assert f"{forward['queries']['blocks']} blocks of queries" in lines[0]


def test_the_command_says_why_nothing_runs_and_fails(capsys):
    assert main([*COMMAND[:-1], "512", "--gpu", "h200"]) == 1
    assert capsys.readouterr().out.count("no CUDA kernel was built") == 2


def test_the_command_packs_sequences(capsys):
    assert main([*COMMAND, "--varlen", "--deterministic", "--kv-heads", "4"]) == 0
    text = capsys.readouterr().out
    chosen = plan(
        "backward",
        varlen=True,
        deterministic=True,
        q_rows=4096,
        k_rows=4096,
        heads=16,
        kv_heads=4,
        d=128,
        dv=128,
    )
    assert f"{chosen['workspace']} bytes workspace (of at most {chosen['workspace_bound']})" in text
