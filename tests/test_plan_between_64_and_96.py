"""The plans of Hopper's kernels for head dims above 64, up to 96. No GPU needed."""

from typing import Any

import pytest
from plans import H100, plan, tile

from jax_flash.spec import AttentionSpec
from jax_flash.workspace import workspace_bound


def rows(pass_: str, d: int, tokens: int, batch: int = 8, **options: Any) -> tuple[int, tuple[int, int]]:
    """The head dim and the tile of the kernel of a call."""
    sizes = {"batch": batch, "q_rows": tokens, "k_rows": tokens, "heads": 16, "kv_heads": 16}
    chosen = plan(pass_, H100, **sizes | {"d": d, "dv": d} | options)
    return chosen["row"]["d"], tile(chosen)


@pytest.mark.parametrize(("d", "row"), [(72, 80), (80, 80), (88, 96), (96, 96)])
def test_the_forward_has_large_tiles_unless_they_leave_too_many_rows_unused(d, row):
    small, large = (row, (128, 128)), (row, (192, 112))
    assert rows("forward", d, 4096) == rows("forward", d, 4096, right=0) == large
    assert rows("forward", d, 4096, dv=40) == rows("forward", 40, 4096, dv=d) == large
    assert rows("forward", d, 729, 64) == rows("forward", d, 257, 64) == large
    many = {"heads": 68, "kv_heads": 34}  # as in test_between_64_and_96.py
    assert rows("forward", d, 470, 3, k_rows=290, **many) == large
    assert rows("forward", d, 1470, 3, varlen=True, **many) == large
    assert rows("forward", d, 256, 64) == small  # few keys
    assert rows("forward", d, 640, 64) == small  # 4 tiles of 192 rows hold 768
    assert rows("forward", d, 1024, 1) == small  # 128 tiles: one wave
    assert (
        rows("forward", d, 4096, left=511, right=0)
        == rows("forward", d, 4096, operands=("window_left",))
        == large
    )
    assert rows("forward", d, 4096, left=255, right=0) == small
    assert rows("forward", d, 8192, 2, varlen=True) == large
    assert rows("forward", d, 8192, 64, varlen=True) == small  # sequences have 128 tokens on average


def test_the_backward_has_tiles_of_96_queries_up_to_head_dim_80():
    tiles_of_96, tiles_of_64 = (80, (96, 128)), (96, (64, 128))
    assert rows("backward", 72, 729) == rows("backward", 80, 4096, right=0) == tiles_of_96
    assert rows("backward", 80, 256) == tiles_of_64  # 3 tiles of 96 rows hold 288
    assert rows("backward", 80, 4096, deterministic=True) == tiles_of_96
    assert rows("backward", 88, 4096) == rows("backward", 96, 4096, deterministic=True) == tiles_of_64
    assert rows("backward", 80, 4096, softcap=3.0)[0] == 128  # these rows have no kernel for this option
    assert rows("backward", 80, 8192, 32, varlen=True) == tiles_of_96  # sequences have 256 tokens on average
    assert rows("backward", 80, 8192, 64, varlen=True) == tiles_of_64  # 128


@pytest.mark.parametrize(("tokens", "packed"), [(1024, False), (896, True)])
def test_the_workspace_of_96_queries_stays_within_its_bound(tokens, packed):
    """dQ's sums have 11 · 96 rows of these tokens; tiles of 128 would have 8 · 128."""
    layout, sizes = ("varlen", (tokens,)) if packed else ("fixed", (1, tokens))
    spec = AttentionSpec(layout)
    shapes = dict.fromkeys(("query", "key", "value"), (*sizes, 4, 72))
    if packed:
        shapes |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), (2,))
    call = {"batch": 1, "q_rows": tokens, "k_rows": tokens, "heads": 4, "kv_heads": 4, "varlen": packed}
    chosen = plan("backward", H100, d=72, dv=72, **call)
    assert tile(chosen) == (96, 128)
    assert 11 * 96 * 4 * 72 * 4 <= chosen["workspace"] <= chosen["workspace_bound"]
    assert chosen["workspace_bound"] == workspace_bound("backward", spec, shapes)
    other = plan("backward", H100, d=64, dv=64, **call)
    assert other["workspace_bound"] < 11 * 96 * 4 * 64 * 4  # smaller heads do not pay for these tiles
