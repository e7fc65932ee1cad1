"""When several CTAs share a tile: parts of a KV head's query heads in the backward, of the batch in dbias."""

from __future__ import annotations

from typing import Any

import pytest
from plans import A100, plan

SEQUENCE: dict[str, Any] = {"batch": 1, "q_rows": 8192, "k_rows": 8192, "right": 0}


def parts(**options: Any) -> int:
    chosen = plan("backward", **{"d": 128, "dv": 128} | SEQUENCE | options)
    assert chosen["workspace"] <= chosen["workspace_bound"]
    return chosen["parts"]


def dbias_parts(bias: tuple[int, ...], **options: Any) -> int:
    sizes = {"q_rows": bias[2], "k_rows": bias[3], "heads": 4, "kv_heads": 4, "d": 32, "dv": 32}
    chosen = plan("bias_gradient", bias=bias, **{"operands": ("bias",)} | sizes | options)
    assert chosen["workspace"] <= chosen["workspace_bound"]
    return chosen["parts"]


@pytest.mark.parametrize("d", [64, 128, 256])
def test_query_heads_are_divided_where_key_tiles_are_few(d):
    of = {"d": d, "dv": d}
    assert parts(heads=8, kv_heads=1, **of) > 1  # an eighth of a model: 64 tiles of unequal length
    assert parts(heads=8, kv_heads=1, q_rows=512, k_rows=512, **of) == 8
    assert parts(heads=6, kv_heads=2, q_rows=512, k_rows=512, varlen=True, **of) == 3


def test_query_heads_stay_together_where_that_is_faster_or_must_be():
    assert parts(heads=8, kv_heads=8) == 1
    assert parts(heads=64, kv_heads=8, batch=2) == 1  # more than 1,000 tiles
    assert parts(heads=8, kv_heads=1, k_rows=16384 + 1, batch=8, right=-1) == 1  # nine full waves
    blocks = {"operands": ("block_mask",), "block": (128, 128)}
    assert parts(heads=8, kv_heads=1, **blocks) == 1  # steps are listed for a KV head
    assert parts(heads=8, kv_heads=1, device=A100) == 1


def test_parts_need_room_for_dk_and_dv_in_float32():
    few, many = ({"heads": 8, "kv_heads": kv_heads} for kv_heads in (1, 8))
    sums = 8 * 8192 * 128 * 4
    assert plan("backward", d=128, dv=128, **SEQUENCE | many)["workspace"] == sums + 256
    shared = plan("backward", d=128, dv=128, **SEQUENCE | few)
    assert shared["workspace"] == sums + shared["parts"] * 8192 * (128 + 128) * 4 + 256


def test_parts_stay_within_the_bound():
    for tokens in (1024, 8192, 32767):  # parts() compares the workspace with its bound
        assert 1 < parts(heads=32, kv_heads=1, q_rows=tokens, k_rows=tokens) <= 2**17 // tokens
    sizes = {"d": 128, "dv": 128, "right": 0, "heads": 32, "kv_heads": 8, "batch": 1, "q_rows": 4096}
    chosen = plan("backward", k_rows=4096, **sizes)  # 256 tiles: no memory for parts
    assert chosen["workspace_bound"] <= chosen["workspace"] + 256


def test_the_batch_is_divided_where_tiles_of_dbias_are_few():
    assert dbias_parts((1, 4, 49, 49), batch=1024) == 32  # four tiles: 128 of the parts for 132 CTAs
    assert dbias_parts((1, 4, 49, 49), batch=30) == 30
    assert dbias_parts((1, 4, 49, 49), batch=67) == 1  # a prime number
    on_hopper = {"batch": 256, "bias_in_chunks": True}
    assert dbias_parts((1, 4, 256, 256), **on_hopper) == 8  # 16 tiles: 128 parts
    assert dbias_parts((1, 4, 256, 256), **on_hopper, operands=("bias", "mask")) == 32  # tiles differ
    assert dbias_parts((1, 4, 768, 768), **on_hopper) == 4  # parts of 144 tiles; eight would not fit
    assert dbias_parts((1, 4, 256, 256), batch=256, device=A100) == 8


def test_the_batch_stays_whole_if_each_entry_has_a_bias_or_its_index_counts():
    assert dbias_parts((64, 4, 49, 49), batch=64) == 1
    assert dbias_parts((1, 4, 49, 49), batch=64, operands=("bias", "dropout"), dropout_rate=0.1) == 1
    assert dbias_parts((1, 4, 49, 49), batch=64, leading=2, leading_rank=1) == 1
    assert dbias_parts((1, 4, 4096, 4096), batch=64) == 1  # 16,384 tiles
