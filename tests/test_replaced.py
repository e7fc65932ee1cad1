"""JF_REPLACED in csrc/kernels.def: kernels that a build for sm_90a alone omits, since no call there needs them."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from checkout import ROOT
from plans import H100, HEAD_DIMS, plan

LINES = re.findall(r"^JF_REPLACED\((.*)\)$", (ROOT / "csrc/kernels.def").read_text(), re.MULTILINE)
REPLACED = [re.split(r" *, *", line) for line in LINES]
DTYPES = {"half": "bfloat16"}
SEGMENTS = ("q_segment_ids", "kv_segment_ids")
OPTIONS: list[dict[str, object]] = [
    {},
    {"left": 100},
    {"scale": -1.0},
    {"scale": 0.0},
    {"softcap": 20.0},
    {"softcap": 500.0},
    *({"operands": names} for names in (SEGMENTS, *((name,) for name in (
        "alibi_slopes", "bias", "mask", "dropout", "ranges", "block_mask", "q_lengths", "position", "sinks")))),
    {"operands": ("block_mask",), "block": (16, 16)},
    {"operands": ("dropout",), "softcap": 20.0},
    {"operands": ("bias", "mask", "dropout")},
    {"operands": ("block_mask", "dropout")},
    {"operands": ("q_lengths", "kv_lengths", "dropout")},
]  # fmt: skip
ALIGNED = {"bias_in_tiles": True, "bias_in_chunks": True, "mask_in_chunks": True}
SIZES = [{}, {"q_rows": 1}, {"q_rows": 0}, {"k_rows": 0}, {"leading": 2}, {"leading": 4, "leading_rank": 2}]


def kinds(words: str) -> set[str]:
    return set(words.split(" | "))


def left_out(row: dict, loader: str) -> set[str]:
    """The kinds of scores of a row that a build for the newer arch omits."""
    out = set()
    for _, arch, pass_, design, of_loader, element, scores in REPLACED:
        same = (row["arch"], row["pass"], row["design"], loader) == (arch, pass_, design, of_loader)
        if same and DTYPES[element] in row["dtypes"]:
            out |= kinds(scores)
    return out


def calls(d: int, dv: int):
    for options, aligned, sizes, deterministic, varlen in itertools.product(
        OPTIONS, ({}, ALIGNED), SIZES, (False, True), (False, True)
    ):
        call = (
            {"block": (128, 128)}
            | options
            | aligned
            | sizes
            | {"d": d, "dv": dv, "deterministic": deterministic}
        )
        yield call | ({"varlen": True, "q_rows": 0 if sizes.get("q_rows") == 0 else 3000} if varlen else {})


@pytest.mark.parametrize("device", [H100, H100 | {"sm_count": 16}], ids=["whole", "slice of an H100"])
@pytest.mark.parametrize(("d", "dv"), [*HEAD_DIMS, (8, 8), (40, 24), (64, 128), (80, 80), (512, 64)])
@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_few_calls_on_hopper_choose_a_kernel_that_is_left_out(d, dv, device, pass_):
    """They are the backward without queries and the forward over several leading dimensions, which no newer row runs.
    The row's kernel for any options runs them."""
    for call in calls(d, dv):
        chosen = plan(pass_, device, **call)
        left = left_out(chosen["row"], "dense")
        if chosen["score"] in left:
            several = pass_ == "forward" and call.get("leading_rank", 0) > 1
            assert several or (pass_ == "backward" and call["q_rows"] == 0), call
            assert "general" in set(chosen["row"]["scores"]) - left


@pytest.mark.parametrize(
    "options", [{}, {"operands": ("alibi_slopes",)}, {"softcap": 20.0}, {"left": 100}], ids=str
)
def test_no_call_on_hopper_runs_the_older_latent_kernels(options):
    sizes = {"paged": True, "kv_heads": 1, "page_size": 64, "d": 576, "dv": 512, "value_dim": 512}
    for heads, q_rows, page_size, float8, d in itertools.product(
        (1, 16, 128), (1, 40, 700), (1, 8, 64), (False, True), (512, 576)
    ):
        try:
            chosen = plan(
                **sizes
                | {"heads": heads, "q_rows": q_rows, "page_size": page_size, "float8": float8, "d": d}
                | options
            )
        except RuntimeError:  # latent float8 pools have no kernel
            continue
        assert not left_out(chosen["row"], "paged")


def scores_left(folder: Path, archs: str, row: str, scores: str) -> str:
    """jf_scores_left() of cmake/kernels.cmake."""
    script = folder / "left.cmake"
    script.write_text(f"""include({ROOT}/cmake/kernels.cmake)
file(STRINGS {ROOT}/csrc/kernels.def replaced REGEX "^JF_REPLACED")
jf_scores_left("${{replaced}}" "{archs}" {row} "{scores}" left)
message("${{left}}")
""")
    done = subprocess.run(["cmake", "-P", script], capture_output=True, text=True, check=True)
    return done.stderr.strip()


@pytest.mark.skipif(not shutil.which("cmake"), reason="needs cmake")
def test_only_builds_for_hopper_alone_leave_kernels_out(tmp_path):
    def left(*arguments: str) -> str:
        return scores_left(tmp_path, *arguments)

    scores, row = "plain | general_dropout", "sm80 backward tiles dense half"
    assert left("90a-real", row, scores) == left("90a", row, scores) == "general_dropout"
    assert left("80;90a-real", row, scores) == left("80", row, scores) == scores
    assert left("90a-real", row.replace("half", "single"), scores) == scores
    assert left("90a-real", row.replace("backward", "tangent"), scores) == scores
    assert left("90a-real", row.replace("backward", "forward"), "general | dropout") == "general"
    assert left("90a-real", "sm80 decode latent paged half", "plain | general") == ""
