"""Writes the tables of docs/matrix.md, which say what kernel runs a call, by asking `python -m jax_flash plan`.

python tools/kernel_matrix.py  # rewrites them in place; tests/test_kernel_matrix.py fails if they are stale
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from pathlib import Path

from jax_flash import plan_command

PAGE = Path(__file__).parent.parent / "docs" / "matrix.md"
DIMS = {"64": "64", "128": "128", "192/128": "192 --value-dim 128", "256": "256", "512": "512"}
OPTIONS = {
    "no option": "",
    "causal mask, window, sinks, lengths": "--causal --window 1024 0 --sinks --kv-lengths",
    "`segment_ids`": "--q-segment-ids",
    "`alibi_slopes`": "--alibi-slopes",
    "`softcap`": "--softcap 30",
    "`dropout_rate`": "--dropout",
    "`bias`": "--bias",
    "`mask`": "--mask",
    "ranges (`masks`)": "--ranges 1",
    "`masks.blocks`": "--blocks 128 128",
    "ALiBi and softcap": "--alibi-slopes --softcap 30",
    "bias and softcap": "--bias --softcap 30",
    "`mask` and `dropout_rate`": "--mask --dropout",
    "`bias` and `mask`": "--bias --mask",
    "`bias` and `dropout_rate`": "--bias --dropout",
    "`deterministic`": "--deterministic",
    "float32": "--dtype float32",
}
TRAINING = "--batch 4 --seqlen 4096 --heads 16"
PAGES = "--paged --batch 64 --kv-seqlen 8192 --heads 32 --kv-heads 8 --causal"
PAGED = {
    "1 token": "--seqlen 1",
    "8 tokens, `draft_mask`": "--seqlen 8 --draft-mask",
    "16 tokens": "--seqlen 16",
    "1 token, float8 pool": "--seqlen 1 --float8",
    "1 token, softcap": "--seqlen 1 --softcap 30",
    "a prompt of 2,048": "--seqlen 2048",
    "a prompt, float8 pool": "--seqlen 2048 --float8",
}


def plan(arguments: str) -> dict[str, str]:
    """For each pass of a call: the kernel's arch, pass and score option, or `–` if there is no kernel."""
    parser = argparse.ArgumentParser()
    plan_command.add_arguments(parser)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        plan_command.run(parser.parse_args(arguments.split()))
    kernels = re.findall(r"^(sm\d+) (\w+) \S+ (\w+) d=", printed.getvalue(), re.MULTILINE)
    asked = {"decode": "forward"}  # decode is a part of a forward
    return {asked.get(pass_, pass_): name(arch, pass_, score) for arch, pass_, score in kernels}


def name(arch: str, pass_: str, score: str) -> str:
    family = "Hopper" if arch == "sm90" else "portable"
    return " ".join([family] + ["decode"] * (pass_ == "decode") + ["general"] * (score == "general"))


def cell(arguments: str, passes: list[str]) -> str:
    kernels = plan(arguments)
    names = [kernels.get(pass_, "–") for pass_ in passes]
    return names[0] if len(set(names)) == 1 else " / ".join(names)


def table(head: str, calls: dict[str, str], base: str, dims: dict[str, str], passes: list[str]) -> str:
    """A line for each set of calls that run the same kernels."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for label, options in calls.items():
        cells = tuple(cell(f"{base} {options} --head-dim {d}", passes) for d in dims.values())
        lines.setdefault(cells, []).append(label)
    rows = [[head, *(f"d {dim}" for dim in dims)], *(["; ".join(x), *cells] for cells, x in lines.items())]
    made = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([made[0], "|---" * len(rows[0]) + "|", *made[1:]])


def render(text: str) -> str:
    """The page with its tables made again."""
    wide = DIMS | {"576/512": "576 --value-dim 512 --latent"}
    tables = {
        "training": table("H100, H200", OPTIONS, f"--gpu h200 {TRAINING}", DIMS, ["forward", "backward"]),
        "pages": table("H100, H200", PAGED, f"--gpu h200 {PAGES}", wide, ["forward"]),
    }
    for mark, made in tables.items():
        pattern = f"(<!-- {mark}: [^\n]*\n).*?(?=\n<!-- end -->)"
        text = re.sub(pattern, lambda found, made=made: found[1] + made, text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text()))
