"""Which of Hopper's rows plan() chooses, and how their CTAs share the tiles. No GPU needed."""

from __future__ import annotations

from typing import Any

import pytest
from cases import CASES, make_inputs, spec
from plans import A100, H100, HEAD_DIMS, plan, tile

from jax_flash.operands import whole_chunks

SEGMENTS = ("q_segment_ids", "kv_segment_ids")
BIAS: dict[str, Any] = {"operands": ("bias",), "bias_in_chunks": True}
MASK: dict[str, Any] = {"operands": ("mask",), "mask_in_chunks": True}


def arch(**options: Any) -> str:
    return plan(**options)["row"]["arch"]


def test_hopper_has_a_forward_of_its_own():
    for d, dv in HEAD_DIMS:
        assert arch(d=d, dv=dv) == arch(d=d, dv=dv, dtype="float16", varlen=True, leading=3) == "sm90"
        for name in ("bias", "mask", "alibi_slopes", "dropout", "q_segment_ids", "ranges"):
            assert arch(d=d, dv=dv, operands=(name,)) == "sm90"
        assert arch(d=d, dv=dv, dtype="float32") == arch(d=d, dv=dv, device=A100) == "sm80"


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("dv", [0, 64, 256, 264, 512])
def test_two_ctas_share_each_query_tile_of_head_dims_above_256(dv, paged):
    call: dict[str, Any] = {"d": 512, "dv": dv, "kv_heads": 1, "paged": paged}
    few = plan(batch=1, heads=2, q_rows=1000, **call)
    assert few["row"]["design"] == "cluster_columns"
    assert tile(few) == (128, 96)
    assert "in 2-CTA clusters" in few["text"]
    assert few["queries"]["blocks"] == 2 * 8
    assert few["persistent_ctas"] == 2 * 2 * 8
    assert plan(batch=16, **call)["persistent_ctas"] == 132
    assert plan(batch=16, device=H100 | {"sm_count": 131}, **call)["persistent_ctas"] == 130
    assert arch(device=H100 | {"sm_count": 1}, **call) == "sm80"


@pytest.mark.parametrize("d", [64, 128, 256, 512])
def test_heads_are_packed_only_if_several_share_few_contiguous_tokens(d):
    sizes = {"d": d, "dv": d, "batch": 132, "k_rows": 512, "kv_heads": 4}
    for heads, q_rows, packed in ((16, 16, True), (16, 17, False), (4, 64, False), (4, 128, False)):
        chosen = plan(heads=heads, q_rows=q_rows, **sizes)["row"]
        assert (chosen["design"] == "packed_heads") == packed, (heads, q_rows)


@pytest.mark.parametrize(("dv", "slices"), [(64, 1), (256, 1), (264, 2), (512, 2)])
def test_ctas_of_their_own_work_on_each_slice_of_256_value_columns(dv, slices):
    """Where heads are packed."""
    chosen = plan(d=512, dv=dv, batch=66, heads=128, kv_heads=2, q_rows=1, paged=True, page_size=64)
    assert chosen["row"]["design"] == "packed_heads"
    assert chosen["queries"]["blocks"] == chosen["persistent_ctas"] == 132
    assert chosen["workspace"] == (256 if slices > 1 else 0)  # a counter, if there are more slices than CTAs


def test_hopper_has_a_backward():
    for d in (24, 32, 64, 72, 96, 128, 160, 192, 224, 256, 264, 320, 512):
        for options in ({}, {"right": 0}, {"left": 100, "right": 5}, {"varlen": True, "leading": 3}):
            assert arch(pass_="backward", d=d, dv=d, dtype="float16", **options) == "sm90"
        for name in ("sinks", "kv_lengths", "position", "ranges"):
            assert arch(pass_="backward", d=d, dv=d, operands=(name,)) == "sm90"
    assert tile(plan("backward")) == (128, 128)
    small = ((512, 512), (264, 64), (64, 264))
    for d, dv in (*small, (128, 128), (64, 128), (192, 128), (192, 192), (256, 256)):
        assert tile(plan("backward", d=d, dv=dv)) == (64, 64 if (d, dv) in small else 128)


def test_two_ctas_share_each_key_tile_of_large_head_dims():
    few = plan("backward", d=256, dv=256)
    assert "in 2-CTA clusters" in few["text"]
    assert few["persistent_ctas"] == 2 * few["keys"]["blocks"] == 2 * 12 * 2 * 2
    assert plan("backward", d=192, dv=128, batch=16)["persistent_ctas"] == 132
    odd = plan("backward", d=192, dv=192, batch=16, device=H100 | {"sm_count": 131})
    assert odd["persistent_ctas"] == 130
    assert "clusters" not in plan("backward", d=128, dv=128)["text"]
    columns = plan("backward", d=512, dv=512, heads=2)  # each CTA has half of them, of all 64 keys
    assert "in 2-CTA clusters" in columns["text"]
    assert columns["keys"]["blocks"] == 24 * 2 * 2
    assert columns["persistent_ctas"] == 132
    assert columns["shared"] == H100["shared_memory"]


@pytest.mark.parametrize("d", [64, 128, 192, 256, 512])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("plain", {}),
        ("softcap", {"softcap": 3.0}),
        ("alibi", {"operands": ("alibi_slopes",)}),
        ("dropout", {"operands": ("dropout",)}),
        ("segments", {"operands": SEGMENTS}),
        ("bias", BIAS),
        ("mask", MASK),
        ("general", {"operands": ("alibi_slopes", "dropout")}),
        ("general", {"operands": SEGMENTS, "softcap": 3.0}),
        ("general", BIAS | MASK | {"operands": ("bias", "mask"), "softcap": 3.0}),
        ("mask_dropout", MASK | {"operands": ("mask", "dropout")}),
        ("bias_mask", BIAS | {"operands": ("bias", "mask")}),
        ("bias_dropout", BIAS | MASK | {"operands": ("bias", "mask", "dropout")}),
        ("general", {"scale": -1.0}),
    ],
)
def test_hoppers_backward_has_kernels_for_options(d, kind, options):
    staged = {"bias", "mask"} & set(options.get("operands", ()))
    if d > 128 and kind not in ("bias", "mask") and staged:  # a bias or a mask must be the only option
        assert arch(pass_="backward", d=d, dv=d, **options) == "sm80"
        return
    row = 256 if d == 192 and kind in ("bias", "mask") else d  # bias and mask run the larger kernel
    if d in (192, 512) and kind in ("softcap", "alibi", "dropout"):  # no model has these options there
        kind = "general"
    for deterministic in (False, True):
        text = plan("backward", d=d, dv=d, deterministic=deterministic, **options)["text"]
        own = "listed_mask" if kind == "mask" and d < 512 and not deterministic else kind
        assert text.startswith(f"sm90 backward dense {own} d={row} dv={row} tile ")
    assert arch(pass_="backward", d=32, dv=32, **options) == "sm90"


@pytest.mark.parametrize("d", [64, 128, 256])
def test_a_float32_bias_has_kernels_of_its_own(d):
    gradients = "sm90 float_bias" if d <= 128 else "sm80 general"
    floats: dict[str, Any] = BIAS | {"bias_in_tiles": True, "float_bias": True, "bias": (1, 8, 1000, 1500)}
    for pass_ in ("forward", "backward", "bias_gradient"):
        found = (plan(pass_, d=d, dv=d, **floats | also) for also in ({}, {"scale": -1.0}))
        wanted = ["sm90 float_bias", "sm90 general"] if pass_ == "forward" else [gradients, "sm80 general"]
        assert [f"{x['row']['arch']} {x['score']}" for x in found] == wanted


@pytest.mark.parametrize(
    "options",
    [
        BIAS | {"bias_in_chunks": False},
        MASK | {"mask_in_chunks": False, "deterministic": True},
        BIAS | {"operands": ("bias", "mask"), "softcap": 3.0},
        {"dtype": "float32"},
        {"q_rows": 0},
        {"device": A100},
    ],
)
def test_other_backwards_run_the_portable_rows(options):
    assert arch(pass_="backward", **options) == "sm80"


def test_several_leading_dimensions_run_hoppers_backward():
    assert arch(leading=6, leading_rank=2) == "sm80"  # the forward's tensor maps have one
    one, two = (plan("backward", leading=6, leading_rank=rank) for rank in (1, 2))
    assert one["text"] == two["text"]
    assert one["workspace"] == two["workspace"]


@pytest.mark.parametrize("d", [24, 64, 72, 128, 192, 256])
def test_the_gradient_of_a_bias_for_queries_and_keys_runs_on_hopper(d):
    def row(bias: tuple[int, ...], **options: Any) -> str:
        chosen = plan("bias_gradient", d=d, dv=d, bias=bias, **BIAS | options)
        return f"{chosen['row']['arch']} {chosen['score']}"

    with_others = "sm90" if d <= 128 else "sm80"
    for bias in ((1, 1, 1000, 1500), (2, 8, 1000, 1500), (1, 8, 1000, 1500)):
        assert row(bias) == row(bias, leading=6, leading_rank=2) == row(bias, right=0) == "sm90 bias"
        assert row(bias, bias_in_chunks=False) == "sm80 general"
        for also in ("q_segment_ids", "alibi_slopes"):
            assert row(bias, operands=("bias", also)) == f"{with_others} general"
        for also in ("mask", "dropout"):
            assert row(bias, operands=("bias", also)) == (f"sm90 bias_{also}" if d <= 128 else "sm80 general")
        several = ("bias", "mask", "alibi_slopes")
        assert row(bias, operands=several) == "sm80 general"
        assert row(bias, operands=several, mask_in_chunks=True) == f"{with_others} general"
    assert row((1, 8, 1, 1500)) == row((1, 8, 1000, 1)) == "sm80 general"  # sums over queries or keys


def test_hoppers_backward_adds_dq_up_in_the_workspace():
    dq = 2 * 1024 * 8 * 64 * 4  # whole tiles
    own: dict[str, Any] = {"kv_heads": 8}  # no parts of dK and dV
    sums = [plan("backward", **own, **on)["workspace"] for on in ({}, {"device": A100})]
    assert sums == [dq + 256, dq]  # on Hopper a counter of tiles
    assert plan("backward", right=0, batch=16, **own)["workspace"] == 8 * dq + 256
    assert plan("backward", d=256, dv=256, **own)["workspace"] == 4 * dq + 256


def test_a_cluster_for_each_head_of_a_short_call_clears_and_rounds_dq():
    def ctas(**options: Any) -> str:
        sizes = {"heads": 16, "kv_heads": 16, "batch": 1, "q_rows": 512}
        _, _, text = plan("backward", **sizes | options)["text"].partition(" in ")
        return text.partition("-CTA clusters")[0]

    assert ctas(k_rows=512) == ctas(k_rows=385, right=0) == ctas(k_rows=512, heads=48, kv_heads=16) == "4"
    assert ctas(k_rows=129) == ctas(k_rows=256, d=128, dv=128) == "2"
    for refused in (
        {"k_rows": 128},
        {"k_rows": 513},
        {"k_rows": 512, "batch": 2},  # more clusters than run at once
        {"k_rows": 512, "q_rows": 2049},
        {"k_rows": 512, "deterministic": True},
        {"k_rows": 512, "varlen": True},
        {"k_rows": 512, "softcap": 3.0},
    ):
        assert ctas(**refused) == ""


def test_hoppers_repeatable_backward_counts_the_tickets_of_key_tiles():
    fast, repeatable = plan("backward"), plan("backward", deterministic=True)
    assert repeatable["queries"]["blocks"] == 0
    tickets = 2 * 8 * 8 * 4  # batch × heads × query tiles of 128 × bytes of a count
    assert repeatable["workspace"] == fast["workspace"] + tickets + 256  # 256 bytes for a counter of tiles
    fast, repeatable = (plan("backward", d=256, dv=256, deterministic=x) for x in (False, True))
    tickets = 2 * 8 * 16 * 4  # both CTAs of a cluster raise the count of a query tile
    assert repeatable["workspace"] == fast["workspace"] + tickets + 256


def test_hoppers_backward_shares_key_tiles_out():
    few, many = plan("backward", heads=2), plan("backward", batch=16)
    assert few["keys"]["blocks"] == few["persistent_ctas"] == 12 * 2 * 2
    assert many["keys"]["blocks"] == 12 * 2 * 16
    assert many["persistent_ctas"] == 132


def test_hopper_takes_fewer_queries_at_a_time_where_they_are_few():
    def rows(d: int = 128, **options: Any) -> int:
        return tile(plan(d=d, dv=d, heads=16, kv_heads=16, **options))[0]

    few, many = {"batch": 1, "q_rows": 512, "k_rows": 512}, {"batch": 1, "q_rows": 1024, "k_rows": 1024}
    assert rows(**few) == rows(d=64, **few) == rows(right=0, **few) == rows(varlen=True, **few) == 64
    assert rows(**many) == 128
    assert rows(d=64, **many) == 128  # the rows of one team
    assert rows(d=64, **many | {"batch": 16}) == 192
    assert rows(**few | {"k_rows": 16384}) == 64
    assert rows(**few | {"batch": 2}) == rows(leading=2, **few) == 128
    assert rows(softcap=3.0, **few) == 128  # this option has no kernel with a smaller query tile


def test_hopper_has_teams_where_rows_see_few_keys():
    def teams(keys: int, **options: Any) -> bool:
        return " of 2 teams" in plan(**{"q_rows": keys, "k_rows": keys, "batch": 16} | options)["text"]

    assert teams(1024, right=0)
    assert teams(16384, left=1024, right=0)
    assert teams(256)
    assert teams(8192, varlen=True, right=0)  # sequences have 512 tokens on average
    assert not teams(2048, right=0)
    assert not teams(16384, left=1025, right=0)
    assert not teams(768)
    assert not teams(1024, right=0, softcap=3.0)  # this option has no kernel with teams
    assert not teams(1024, right=0, d=128, dv=128)
    assert teams(16384, d=32, dv=32)  # here they are faster with any number of keys
    assert not teams(512, right=0, batch=1)  # with few queries, tiles of 64 rows fill the SMs better


def test_hopper_has_teams_where_large_tiles_leave_more_of_the_last_round_idle():
    def teams(keys: int, batch: int, **options: Any) -> bool:
        sizes = {"q_rows": keys, "k_rows": keys, "batch": batch, "heads": 16, "kv_heads": 16}
        return " of 2 teams" in plan(**sizes | options)["text"]

    assert not teams(1024, 1)  # 128 tiles: each SM has one of two consumers
    assert teams(1024, 2)  # 256 tiles or 192
    assert teams(512, 8)  # 512 tiles or 384
    assert not teams(768, 4)  # 384 tiles or 256
    assert teams(1024, 10)  # 8 waves of large tiles
    assert teams(3072, 1, heads=26, kv_heads=26)  # 5 waves or 4
    assert not teams(4096, 1, heads=20, kv_heads=20)  # likewise, but long tiles come from a counter
    assert not teams(1024, 12)  # 9 waves
    assert not teams(512, 8, operands=("kv_lengths",))  # the tiles take different times
    assert teams(1024, 2, operands=("kv_lengths",))  # the tiles take different times, but all run in one wave
    assert teams(2048, 1, right=0)
    assert not teams(2048, 2, right=0)
    assert not teams(8192, 8, varlen=True)


def test_teams_share_tiles_out():
    def of_heads(heads: int, **options: Any) -> dict[str, Any]:
        return plan(q_rows=140, k_rows=140, heads=heads, kv_heads=1, batch=1, **options)

    counter = 256  # bytes of workspace
    few, many = of_heads(132, right=0), of_heads(136, right=0)  # two tiles per head
    assert tile(few) == tile(many) == (128, 64)
    assert "264 query tiles on 132 persistent CTAs of 2 teams" in few["text"]
    assert (few["workspace"], many["workspace"]) == (0, counter)
    assert few["shared"] == 2 * (2 * (128 * 64 + 3 * 64 * (64 + 64)) + 2048)
    equal = plan(q_rows=128, k_rows=100, heads=272, kv_heads=4, batch=1)
    assert (tile(equal), equal["workspace"]) == ((128, 64), 0)


@pytest.mark.parametrize("pass_", ["forward", "backward"])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_a_counter_hands_out_long_tiles_although_they_are_equal(pass_, d):
    """If NCCL's kernel occupies some SMs, CTAs that begin late leave their tiles to others."""

    def workspace(rows: int, heads: int) -> int:
        return plan(pass_, q_rows=rows, k_rows=rows, heads=heads, kv_heads=heads, batch=1, d=d, dv=d)[
            "workspace"
        ]

    def sums(rows: int, heads: int) -> int:
        return rows * heads * d * 4 if pass_ == "backward" else 0

    assert workspace(2048, 32) == sums(2048, 32)
    assert workspace(4096, 32) == sums(4096, 32) + 256
    assert workspace(4096, 1) == sums(4096, 1)  # each CTA has one tile


def test_the_contracts_cases_reach_every_tile_of_hoppers_plain_forward():
    reached = set()
    for case in CASES:
        inputs = make_inputs(case)
        of_case, packed = spec(case, inputs), case.layout == "varlen"
        query, key = inputs.positional["query"], inputs.positional["key"]
        chosen = plan(
            varlen=packed, batch=len(case.q_sequences) if packed else case.b, q_rows=query.shape[-3],
            k_rows=key.shape[-3], heads=case.hq, kv_heads=case.hk, d=whole_chunks(case.d),
            dv=whole_chunks(case.dv), left=of_case.left, right=of_case.right, softcap=of_case.softcap,
            operands=of_case.operands,
        )  # fmt: skip
        if "sm90 forward dense plain" in chosen["text"]:
            of = chosen["row"]["d"], *tile(chosen)
            parallel = 132 * (2 if " teams" in chosen["text"] else 1)
            reached.add(of)
            if chosen["queries"]["blocks"] > parallel:  # at least one CTA or team has several tiles
                reached.add((*of, "by a counter" if chosen["workspace"] else "in turn"))
    assert reached >= {(64, 64, 128), (128, 64, 128), (128, 128, 128), (256, 128, 80)}
    assert reached >= {(64, 128, 64, how) for how in ("by a counter", "in turn")}  # rows with teams
    assert reached >= {
        (64, 192, 128, "in turn"),
        (32, 128, 64, "by a counter"),
        (128, 128, 128, "by a counter"),
    }


def test_hoppers_blocks_work_in_pairs_where_all_rows_see_many_keys():
    def pairs(rows: int, keys: int, d: int = 256, **options: Any) -> bool:
        return "in 2-CTA clusters" in plan(d=d, dv=d, q_rows=rows, k_rows=keys, **options)["text"]

    assert pairs(8192, 8192)
    assert pairs(8192, 8192, right=0)
    assert not pairs(4096, 4096)
    assert not pairs(8192, 8192, left=4096, right=4096)
    assert not pairs(8192, 8192, left=8192, right=0)
    assert not pairs(8192, 8192, operands=("kv_lengths",))
    assert not pairs(8192, 8192, d=128)  # d = 128 has no such kernel
    assert not pairs(8192, 8192, d=192)
    assert not pairs(8192, 8192, softcap=3.0)
    assert not pairs(8192, 8192, varlen=True)
    assert not pairs(300, 8192)
    assert pairs(17 * 128, 8192)
    assert (
        "on 16 persistent CTAs in 2-CTA clusters"
        in plan(d=256, dv=256, batch=1, q_rows=256, k_rows=8192)["text"]
    )
    odd = plan(device=H100 | {"sm_count": 133}, d=256, dv=256, q_rows=8192, k_rows=8192)
    assert "on 132 persistent CTAs in 2-CTA clusters" in odd["text"]


def test_hopper_copies_pages_by_groups_of_eight_rows():
    pages = {"paged": True, "d": 128, "dv": 128}
    assert (
        arch(page_size=8, **pages) == arch(page_size=48, **pages) == arch(page_size=1024, **pages) == "sm90"
    )
    assert arch(page_size=4, **pages) == arch(page_size=12, **pages) == "sm80"
    assert arch(page_size=16, float8=True, **pages) == "sm90"


def test_three_consumers_have_registers_for_one_option_of_the_score():
    assert tile(plan(d=64, dv=64, batch=64))[0] == 192  # many waves of tiles
    for names in (("alibi_slopes",), ("q_segment_ids", "kv_segment_ids"), ("dropout",)):
        assert tile(plan(d=64, dv=64, operands=names))[0] == 192
    assert tile(plan(d=64, dv=64, softcap=3.0))[0] == 192
    assert tile(plan(d=64, dv=64, softcap=3.0, operands=("alibi_slopes",)))[0] == 128
    assert tile(plan(d=64, dv=64, operands=("alibi_slopes", "dropout")))[0] == 128
    assert tile(plan(d=64, dv=64, operands=("mask",)))[0] == 128
    assert tile(plan(d=64, dv=64, scale=-1.0))[0] == 128


@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        ({}, "plain"),
        ({"operands": ("alibi_slopes",)}, "alibi"),
        ({"operands": SEGMENTS}, "segments"),
        ({"operands": ("dropout",)}, "dropout"),
        ({"softcap": 30.0}, "softcap"),
        ({"softcap": 1e4}, "general"),  # exponentials of up to 1e4 do not fit in float32
        ({"softcap": 30.0, "operands": ("dropout",)}, "general"),
    ],
)
def test_one_option_of_the_score_has_a_kernel_of_its_own_on_hopper(options, kernel):
    assert plan(d=128, dv=128, **options)["text"].split()[3] == kernel
    others = kernel if kernel in ("plain", "dropout") else "general"
    assert plan(d=128, dv=128, device=A100, **options)["text"].split()[3] == others


def test_blocks_that_stay_count_tiles_of_unequal_length():
    for batch, q_rows, bytes_ in (
        (9, 1024, 0),
        (9, 1000, 256),
        (1, 1000, 0),
    ):  # the last: 64 tiles on 132 SMs
        assert plan(d=128, dv=128, batch=batch, q_rows=q_rows)["workspace"] == bytes_
