"""`python -m jax_flash plan`: what it prints of the plans of a described call, and what it refuses. No GPU needed."""

from __future__ import annotations

import pytest
from plans import A100, PASSES, plan, tile

from jax_flash.__main__ import main

COMMAND = ["plan", "--batch", "2", "--seqlen", "4096", "--heads", "16", "--head-dim", "128"]


def test_the_command_prints_a_line_per_pass(capsys):
    assert main([*COMMAND, "--gpu", "a100", "--bias", "--softcap", "30"]) == 0
    gpu, *lines, legend = capsys.readouterr().out.splitlines()
    assert legend == "plan --help explains the words"
    assert gpu == "NVIDIA A100: sm_80, 108 SMs, 166912 bytes of shared memory"
    assert [(line.split()[1], line.split()[3]) for line in lines] == [(name, "general") for name in PASSES]
    forward = plan(device=A100, batch=2, q_rows=4096, k_rows=4096, heads=16, kv_heads=16, d=128, dv=128)
    assert f"tile {tile(forward)[0]}x{tile(forward)[1]}" in lines[0]
    assert f"{forward['queries']['blocks']} query tiles" in lines[0]


@pytest.mark.parametrize("layout", [[], ["--varlen"], ["--paged"]])
def test_the_command_describes_calls_with_masks(layout, capsys):
    blocks = ["sm80", "general"] if layout else ["sm90", "blocks"]
    for mask, forward in ((["--ranges", "2"], ["sm90", "ranges"]), (["--blocks", "128", "64"], blocks)):
        assert main([*COMMAND, "--gpu", "h200", *layout, *mask]) == 0
        assert capsys.readouterr().out.splitlines()[1].split()[:4:3] == forward


def test_the_command_says_why_nothing_runs_and_fails(capsys):
    assert main([*COMMAND, "--gpu", "t4"]) == 1
    assert capsys.readouterr().out.count("query is bfloat16, which sm_75 has no products of") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv-heads", "3"], "flash_attention: key has 3 heads, which does not divide query's 16"),
        (["--head-dim", "520"], "flash_attention: query has head dim 520, allowed are 1 to 512"),
        (["--window", "-3", "0"], "flash_attention: window"),
        (["--window", "-1", "none"], "flash_attention: window"),
        (["--paged", "--page-size", "0"], "paged_attention: "),
        (["--page-size", "16"], "--page-size is an option of paged calls: add --paged"),
        (["--num-splits", "0"], "--num-splits is an option of paged calls: add --paged"),
        (["--bias-dtype", "float32"], "--bias-dtype is an option of calls with a bias: add --bias"),
        (["--draft-mask"], "--draft-mask is an option of paged calls: add --paged"),
        (["--mask", "--varlen"], "--mask is an option of flash_attention: leave out --varlen and --paged"),
        (["--dropout", "--paged"], "--dropout is an option of calls without pages: leave out --paged"),
    ],
)
def test_the_command_refuses_what_the_function_refuses(arguments, message, capsys):
    assert main([*COMMAND, *arguments]) == 2
    assert capsys.readouterr().out.startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "-1"], "argument --batch: -1 is negative"),
        (["--blocks", "128", "20"], "argument --blocks: invalid choice: 20"),
        *(([x, "x"], f"argument {x}: 'x' is not a whole number") for x in ("--batch", "--num-splits")),
    ],
)
def test_the_command_refuses_numbers_that_no_call_has(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main([*COMMAND, *arguments])
    assert message in capsys.readouterr().err


def test_the_command_describes_paged_calls(capsys):
    paged = [*COMMAND, "--gpu", "h200", "--paged", "--kv-seqlen", "8192"]
    assert main(paged) == 0
    assert "sm90 forward paged plain" in capsys.readouterr().out
    assert main([*paged, "--page-size", "4"]) == 0
    assert "sm80 forward dense|paged plain" in capsys.readouterr().out
    assert main([*paged, "--seqlen", "1"]) == 0
    assert "sm80 decode" in capsys.readouterr().out
    assert main([*paged, "--varlen", "--float8"]) == 0
    out = capsys.readouterr().out
    assert "decode splits" in out
    assert "sm90 forward paged plain" in out


def test_the_command_says_its_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("jax_flash ")


def test_the_command_pads_head_dims_as_a_call_does(capsys):
    def lines(head_dim):
        assert main([*COMMAND[:-1], head_dim, "--gpu", "h200"]) == 0
        return capsys.readouterr().out

    assert lines("100") == lines("104")


@pytest.mark.parametrize(
    ("keys", "dtypes", "kind"),
    [
        ("4096", ["bfloat16"], "bias"),
        ("4097", ["bfloat16"], "bias"),  # padded by a copy
        ("4096", ["float32"], None),
        ("4096", ["float16", "--bias-dtype", "float16"], "bias"),
        ("4096", ["float16", "--bias-dtype", "float32"], "float_bias"),
        ("4096", ["float16", "--bias-dtype", "bfloat16"], "general"),
    ],
)
def test_the_command_names_the_kernel_of_a_bias_alone_on_hopper(keys, dtypes, kind, capsys):
    """A bias of the dtype of the call, or of float32, has a kernel of its own."""
    main([*COMMAND, "--gpu", "h200", "--bias", "--kv-seqlen", keys, "--dtype", *dtypes])
    line = capsys.readouterr().out.splitlines()[1]
    arch, _, _, score = line.split()[:4]
    assert (arch, score) == (("sm90", kind) if kind else ("sm80", "general"))


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
    assert f"{chosen['workspace']} bytes of workspace (of at most {chosen['workspace_bound']})" in text
