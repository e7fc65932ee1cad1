"""benchmarks/: the scaling suite's cells on forced host devices, its bars and profiles, and predict.py's output."""

import math
import re

import checkout  # noqa: F401
import jax
import pytest
from programs import require_devices

from benchmarks import (
    bars_scaling,
    cases,
    measure,
    overlap,
    predict,
    report,
    scaling,
    suite_scaling,
    training_step,
)


@pytest.fixture
def two_devices(monkeypatch):
    """Runs the suite as on a machine of two devices, timing each call once."""
    require_devices(2)
    monkeypatch.setattr(suite_scaling, "device_count", lambda: 2)
    monkeypatch.setattr(suite_scaling, "timed", once)


def once(calls, work=0.0):
    times = measure.interleaved(calls, 1, 0.0, settle=0)
    return {name: measure.summary(seconds) for name, seconds in times.items()}


def test_every_way_to_split_a_sequence_is_timed(two_devices):
    cells = list(suite_scaling.sequence_cells(128, h=2, d=16))
    assert [(c["what"], c["pass"]) for c in cells] == [
        (what, pass_) for what in ("full", "causal", "window") for pass_ in ("forward", "both")
    ]
    ways = [set(c["times"]) - {"one device"} for c in cells]
    assert ways[1] == {"contiguous", "all_to_all", "jit"}
    assert ways[2] == ways[3] == {"contiguous", "zigzag", "all_to_all"}
    assert ways[4] == {"contiguous"}
    assert "zigzag" in bars_scaling.verdict(cells[3])
    assert len(predict.check(cells, predict.H200)) == 2 + sum(map(len, ways))
    assert predict.measured_rates(cells).both == cells[1]["flop"] / cells[1]["times"]["one device"]["median"]


def test_a_way_that_does_not_compile_is_left_out_with_its_reason(two_devices, monkeypatch):
    whole = scaling.compiled_or_refused

    def all_but_zigzag(jobs):
        calls, refused = whole({name: job for name, job in jobs.items() if "zigzag" not in name})
        return calls, refused | {name: {"refused": "a cycle"} for name in jobs if "zigzag" in name}

    monkeypatch.setattr(scaling, "compiled_or_refused", all_but_zigzag)
    cells = list(suite_scaling.sequence_cells(64, h=2, d=16))
    assert cells[2]["times"]["zigzag"] == {"refused": "a cycle"}
    assert "zigzag" not in bars_scaling.verdict(cells[2])
    assert bars_scaling.judge(cells) == []  # these have other lengths
    assert len(predict.check(cells[2:3], predict.H200)) == 2 + 2


def test_batch_and_heads_are_timed_and_their_programs_have_no_collective(two_devices):
    cells = list(suite_scaling.sharded_cells(128, h=4))
    assert all(not found for c in cells for found in c["collectives"].values())
    bars = {bar.name: bar for bar in bars_scaling.judge(cells)}
    assert bars["batch and heads, collectives"].met
    assert "batch and heads both, of linear" in bars
    # A limit of 0 must work too.
    report.draw_bars(suite_scaling.SUITE, cells, pytest.importorskip("matplotlib.pyplot"))


def test_links_are_timed_with_the_bytes_that_they_move(two_devices):
    (cell,) = suite_scaling.link_cells((1 << 10, 1 << 16))
    assert cell["bytes"] == {
        "ppermute 1 KiB": 1 << 10,
        "ppermute 64 KiB": 1 << 16,
        "all_to_all 64 KiB": 1 << 15,
    }
    assert "GB/s a direction: ppermute 1 KiB" in bars_scaling.verdict(cell)


def test_the_training_step_runs_on_every_mesh(two_devices):
    tiny = {"layers": 1, "width": 32, "heads": 2, "head_dim": 16, "hidden": 64, "dtype": "float32"}
    (cell,) = suite_scaling.training_cells(tokens=256, **tiny)
    assert list(cell["times"]) == ["one device", "data", "heads", "sequence"]
    assert {bar.name for bar in bars_scaling.judge([cell])} == {
        f"training step, {way}, of linear" for way in ("data", "heads", "sequence")
    }
    assert cell["flop"] == 6 * 256 * (32 * (4 * 32 + 2 * 64) + 256 * 32) + 2 * 3.5 * 4 * 32 * 128 * 129 / 2


def test_every_mesh_takes_the_same_training_step(two_devices):
    tiny = {"layers": 1, "width": 32, "heads": 2, "head_dim": 16, "hidden": 64, "dtype": "float32"}
    meshes = {"one device": "", "sequence": "sequence=2"}
    steps, _, _ = training_step.scaled(meshes, 2, tokens=128, **tiny)
    losses = [[float(step()) for _ in range(3)] for step in steps.values()]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][2] < losses[0][0]


def test_a_layers_memory_goes_down_with_the_devices():
    """No array in a device's program is larger than a few shards. The number of arrays alive at once is not tested:
    XLA:CPU drops the barriers that keep the shards of keys from being alive together."""
    require_devices(8)
    case = cases.ring_case(8192, "causal", 2, 16).replace(dtype="float32")
    for count in (2, 4, 8):
        ((program, _),) = scaling.compiled({"": scaling.layer_job(case, count)}).values()
        shapes = re.findall(r"\w+\[([\d,]+)\]", program.as_text())
        largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
        assert largest <= 4 * case.sq // count * case.hq * case.d


def test_by_all_to_all_memory_goes_down_with_the_devices():
    require_devices(4)
    case = cases.ring_case(8192, "causal", 4, 16).replace(dtype="float32")
    found = {}
    for count in (2, 4):
        mesh = scaling.mesh_of(count)
        call = scaling.ring(case, mesh, mode="all_to_all")
        job = scaling.prepare(call, "both", scaling.draw(case, mesh, scaling.SHARD))
        ((program, _),) = scaling.compiled({"": job}).values()
        found[count] = scaling.program_bytes(program)["temporary"]
    assert found[4] < 0.6 * found[2]


def test_a_memory_cell_has_the_formula_beside_the_program(two_devices):
    (cell,) = suite_scaling.memory_cells(256, h=2, d=16)
    assert cell["formula"] > 0
    assert cell["program"]["all"] > 0
    assert "formula" in bars_scaling.verdict(cell)


def test_transfers_under_kernels_are_measured_from_a_profiles_events():
    events = [
        ("Stream #1", "flash_forward_kernel", 0.0, 4.0),
        ("Stream #2", "ncclDevKernel_SendRecv", 1.0, 3.0),
        ("Stream #2", "MemcpyP2P", 3.5, 5.0),
        ("Stream #1", "loop_add_fusion", 4.5, 6.0),
    ]
    found = overlap.summary({"/device:GPU:0": events})["/device:GPU:0"]
    assert found["transfers"] == pytest.approx(3.5)
    assert found["hidden"] == pytest.approx(2.0 + 0.5 + 0.5)
    assert (found["kernels"], found["span"]) == (5.5, 6.0)
    assert "86% of 3500.0 ms" in bars_scaling.verdict({"kind": "overlap", "profile": {"": found}})


def test_overlapping_intervals_are_joined_and_intersected():
    assert overlap.union([(3, 4), (0, 1), (0.5, 2)]) == [(0, 2), (3, 4)]
    assert overlap.intersection([(0, 2), (3, 4)], [(1, 3.5)]) == [(1, 2), (3, 3.5)]


def test_a_contiguous_causal_ring_is_bound_by_its_last_device():
    assert bars_scaling.contiguous_bound(2) == pytest.approx(2 / 3)
    cell = {"kind": "sequence", "what": "causal", "pass": "both", "s": 131072, "devices": 2, "name": "causal"}
    cell["times"] = {"one device": {"median": 3.0}, "contiguous": {"median": 2.25}, "zigzag": {"median": 1.5}}
    bars = {bar.name: bar for bar in bars_scaling.judge([cell])}
    assert bars["causal contiguous s131072 both, of its bound"].value == pytest.approx(1.0)
    assert bars["causal zigzag s131072 both, of linear"].value == pytest.approx(1.0)


@pytest.mark.parametrize("devices", [2, 8])
def test_predictions_are_linear_where_links_are_fast_and_bound_where_order_is_contiguous(devices):
    case = cases.ring_case(1 << 20, "causal")
    fast = predict.Rates(link=1e15, network=1e15, memory=1e18)
    alone = predict.ring_seconds(case, "both", 1, fast)
    zigzag, contiguous = (
        predict.ring_seconds(case, "both", devices, fast, order) for order in ("zigzag", "contiguous")
    )
    assert alone / zigzag == pytest.approx(devices, rel=1e-3)
    assert alone / contiguous / devices == pytest.approx(bars_scaling.contiguous_bound(devices), rel=1e-3)
    slow = predict.Rates(link=1e6)
    assert predict.ring_seconds(case, "forward", 2, slow) == pytest.approx(
        predict.shard_bytes(case, 2) / 1e6, rel=0.05
    )


def test_predict_prints_a_table(capsys):
    assert predict.main([]) == 0
    assert "| 512 |" in capsys.readouterr().out


def test_the_suite_needs_two_devices(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with pytest.raises(SystemExit, match="needs two devices"):
        suite_scaling.device_count()
