"""plan() of a described GPU, for test_plan and test_plan_hopper."""

from __future__ import annotations

from typing import Any

import pytest

core = pytest.importorskip("jax_flash._core")

H100 = {"capability": 90, "sm_count": 132, "shared_memory": 232_448}
A100 = {"capability": 80, "sm_count": 108, "shared_memory": 166_912}
T4 = {"capability": 75, "sm_count": 40, "shared_memory": 65_536}
RTX4090 = {"capability": 89, "sm_count": 128, "shared_memory": 101_376}
HEAD_DIMS = ((32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))


def plan(pass_: str = "forward", device: dict[str, int] = H100, **options: Any) -> dict[str, Any]:
    defaults = {"dtype": "bfloat16", "batch": 2, "q_rows": 1000, "k_rows": 1500, "heads": 8, "kv_heads": 2}
    return core.plan(pass_=pass_, **defaults | {"d": 64, "dv": 64} | device | options)


def tile(chosen: dict[str, Any]) -> tuple[int, int]:
    return chosen["row"]["block_m"], chosen["row"]["block_n"]
