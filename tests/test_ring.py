"""Ring attention inside shard_map: a sequence split over devices gives what one device gives, both ways."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
import oracle
import pytest
from cases import Case, make_inputs
from checks import references
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from programs import require_devices

from jax_flash import ring_attention

PLAIN = Case("plain", sq=16, sk=16, d=8, dv=8)
CAUSAL = PLAIN.replace(name="causal", causal=True)
CASES = (
    PLAIN,
    CAUSAL,
    CAUSAL.replace(name="causal, more keys", sk=32),
    CAUSAL.replace(name="causal, more queries", sq=32),
    CAUSAL.replace(name="causal top left, more keys", sk=32, align="top_left"),
    PLAIN.replace(name="window", sq=32, sk=32, window=(5, 3)),
    CAUSAL.replace(name="causal window", sq=32, sk=32, window=(6, None)),
    PLAIN.replace(name="window that misses", sq=32, window=(2, 0), align="top_left", sinks=True),
    CAUSAL.replace(name="segments", segments=3),
    CAUSAL.replace(name="lengths", q_lengths=(13, 5), kv_lengths=(7, 11), alibi_slopes=(4,)),
    PLAIN.replace(name="lengths, full", q_lengths=(16, 3), kv_lengths=(0, 9), sinks=True),
    PLAIN.replace(name="mask and bias", mask=(2, 1, 1, 16), bias=(1, 4, 16, 16)),
    PLAIN.replace(name="bias of keys", bias=(2, 1, 1, 16), hk=1),
    CAUSAL.replace(name="alibi", alibi_slopes=(2, 4), sk=32),
    CAUSAL.replace(name="dropout", dropout_rate=0.3),
    Case(
        "everything",
        sq=16,
        sk=32,
        d=8,
        dv=16,
        causal=True,
        window=(11, None),
        softcap=4.0,
        mask=(1, 4, 1, 32),
        bias=(2, 1, 16, 32),
        segments=2,
        q_lengths=(16, 14),
        kv_lengths=(20, 32),
        alibi_slopes=(2, 4),
        sinks=True,
        dropout_rate=0.2,
    ),
)


def mesh_of(devices: int) -> jax.sharding.Mesh:
    require_devices(devices)
    return jax.make_mesh((devices,), ("ring",), (AxisType.Auto,), devices=jax.devices()[:devices])


def order_of(order: str, tokens: int, devices: int) -> np.ndarray:
    """The position in the sequence of each token of the array that is split."""
    if order == "contiguous":
        return np.arange(tokens)
    parts = np.arange(tokens).reshape(2 * devices, -1)
    return np.concatenate([parts[[i, -1 - i]].reshape(-1) for i in range(devices)])


def in_ring(case: Case, order: str, devices: int, **options: Any) -> Any:
    """(query, key, value, keywords) of a whole sequence → (out, lse), by devices in a ring."""
    mesh = mesh_of(devices)
    rows, columns = (order_of(order, size, devices) for size in (case.sq, case.sk))

    def run(arrays: dict[str, Any]) -> Any:
        placed, specs = dict(arrays), {name: P() for name in arrays}
        for name in ("query", "key", "value"):
            placed[name] = placed[name][:, rows if name == "query" else columns]
            specs[name] = P(None, "ring")
        if "segment_ids" in arrays:
            ids = arrays["segment_ids"]
            placed["segment_ids"] = ids[0][:, rows], ids[1][:, columns]
            specs["segment_ids"] = (P(None, "ring"),) * 2
        for name in ("mask", "bias"):
            if name in arrays and arrays[name].shape[2] > 1:
                placed[name] = placed[name][:, :, rows]
                specs[name] = P(None, None, "ring")
        call = partial(
            ring_attention, axis_name="ring", order=order, return_lse=True, **case.options | options
        )
        mapped = jax.shard_map(
            lambda x: call(**x),
            mesh=mesh,
            in_specs=(specs,),
            out_specs=(P(None, "ring"), P(None, None, "ring")),
        )
        out, lse = mapped(placed)
        back = np.argsort(rows)
        return out[:, back], lse[:, :, back]

    return run


def check(case: Case, order: str, devices: int, implementation: str) -> None:
    inputs = make_inputs(case)
    moving, fixed = oracle.split(inputs.positional | inputs.keywords)
    run = in_ring(case, order, devices, implementation=implementation)
    got = oracle.differentiate(lambda moving: run(moving | fixed), moving, inputs.dout, inputs.dlse)
    oracle.assert_result(got, *references(case), case)


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_ring_of_four_is_the_whole(kernel, case, order):
    check(case, order, 4, kernel)
