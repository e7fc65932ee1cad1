"""plan() of a described GPU, for the tests of plans."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from jax_flash.spec import AttentionSpec

core = pytest.importorskip("jax_flash._core")

H100 = {"capability": 90, "sm_count": 132, "shared_memory": 232_448}
H200 = H100  # the same for plan()
A100 = {"capability": 80, "sm_count": 108, "shared_memory": 166_912}
T4 = {"capability": 75, "sm_count": 40, "shared_memory": 65_536}
A10 = {"capability": 86, "sm_count": 72, "shared_memory": 101_376}
RTX4090 = {"capability": 89, "sm_count": 128, "shared_memory": 101_376}
PASSES = ("forward", "backward", "tangent", "bias_gradient")
HEAD_DIMS = ((32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256), (512, 512))


# The sizes of a call by their names in these tests, and the dimensions of csrc/operands.def that have them.
SIZES = {"batch": "b", "q_rows": "sq", "k_rows": "sk", "heads": "hq", "kv_heads": "hk", "d": "d", "dv": "dv"}
SIZES |= {"page_size": "ps", "draft_rows": "draft_row", "pool_columns": "pool_columns"}
STATIC = {field.name for field in dataclasses.fields(AttentionSpec)} - {"operands"}


def plan(pass_: str = "forward", device: dict[str, int] = H100, **options: Any) -> dict[str, Any]:
    """The plan of a call with these sizes and static options; `operands` are the names of the optional ones."""
    defaults = {"dtype": "bfloat16", "batch": 2, "q_rows": 1000, "k_rows": 1500, "heads": 8, "kv_heads": 2}
    given = defaults | {"d": 64, "dv": 64} | device | options
    paged, varlen = given.pop("paged", False), given.pop("varlen", False)
    layout = ("paged_varlen" if varlen else "paged") if paged else "varlen" if varlen else "fixed"
    sizes = {SIZES[name]: given.pop(name) for name in list(given) if name in SIZES}
    static = {name: given.pop(name) for name in list(given) if name in STATIC}
    spec = AttentionSpec(layout, operands=given.pop("operands", ()), **static)
    return core.plan(pass_=pass_, spec=spec.plain_attributes(), sizes=sizes, **given)


def plan_decode(device: dict[str, int] = H200, **options: Any) -> dict[str, Any]:
    """The plan of a decode step over pages."""
    defaults = {"dtype": "bfloat16", "batch": 64, "q_rows": 1, "k_rows": 8192, "heads": 32, "kv_heads": 8}
    return plan("forward", **defaults | {"d": 128, "dv": 128, "paged": True} | device | options)


def tile(chosen: dict[str, Any]) -> tuple[int, int]:
    return chosen["row"]["block_m"], chosen["row"]["block_n"]
