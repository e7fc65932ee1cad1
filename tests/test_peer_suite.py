"""benchmarks/: on a CPU and at tiny sizes, every section of the peers' suite runs, and a failure becomes a note."""

import json
import sys
from pathlib import Path

import jax
import pytest
from conftest import IMPLEMENTATION

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks").exists():
    pytest.skip("only the tests are here, not the benchmarks", allow_module_level=True)
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

import jax_flash  # noqa: E402
from benchmarks import (  # noqa: E402
    __main__,
    adapters,
    bars_peers,
    cases,
    decode_calls,
    host_time,
    measure,
    peer_attention,
    peer_decode,
    peer_figures,
    peers,
    sections,
    step_serving,
    step_training,
    suite_peers,
)
from benchmarks.suite import Suite  # noqa: E402

pytestmark = pytest.mark.skipif(
    IMPLEMENTATION != "cpu", reason="the suite itself runs on GPUs, at its own sizes"
)


def once(calls, *_, **__):
    times = measure.interleaved(calls, 1, 0.0, settle=0)
    return {name: measure.summary(seconds) for name, seconds in times.items()}


def tiny(case):
    """The same case with few tokens and heads."""
    hq, hk = (4, 2) if case.hq != case.hk else (2, 2)
    changes = {"b": 1, "sq": 16 + case.sq % 8, "sk": 16 + case.sk % 8, "hq": hq, "hk": hk, "d": 16, "dv": 16}
    if case.layout == "varlen":
        changes["q_sequences"] = (5, 9, 2)
    if case.window:
        changes["window"] = (4, 0)
    if case.bias:
        changes["bias"] = (1, 1, 16, 16)
    if case.alibi_slopes:
        changes["alibi_slopes"] = (hq,)
    return case.replace(**changes)


@pytest.fixture
def small(monkeypatch):
    """The suite at tiny sizes, each call once, with the names and head dims of its cells unchanged."""
    if not any(b.implementation == "cpu" and not b.problem for b in jax_flash.backends()):
        pytest.skip("no library is built here")
    monkeypatch.setattr(measure, "in_turns", once)
    monkeypatch.setattr(measure, "matmul_call", lambda *_: (lambda x: x, [(1.0,)]))
    monkeypatch.setattr(peer_attention, "SMALL_CHAIN", 2)
    monkeypatch.setattr(peer_decode, "CHAIN_OF_SHORT", 2)
    monkeypatch.setattr(decode_calls, "CHAIN", 2)
    prepare = peers.prepare

    def prepare_tiny(what, **options):
        return prepare(
            {key: (name, tiny(case), pass_) for key, (name, case, pass_) in what.items()}, **options
        )

    monkeypatch.setattr(peers, "prepare", prepare_tiny)
    return monkeypatch


# --- the runner -------------------------------------------------------------------------------------------------------


def suite_of(**found):
    return Suite(
        "peers", "cpu", found, bars_peers.judge, suite_peers.verdict, suite_peers.rates, suite_peers.tables
    )


def cell(name, **tags):
    return {
        "kind": "peer",
        "name": name,
        "case": name,
        "pass": "backward",
        "of": "matrix",
        "d": 64,
        "flop": 1e9,
    } | tags


def summary(seconds):
    return {"median": seconds, "spread": 0.0, "times": [seconds]}


def test_every_cell_is_kept_when_a_run_is_stopped(tmp_path):
    def stopped():
        yield cell("a", times={"jax_flash": summary(1e-3)})
        kept = json.loads((tmp_path / "report.json").read_text())["sections"]
        assert [c["name"] for c in kept["first"]["cells"]] == ["a"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sections.run(suite_of(first=stopped), ["first"], tmp_path)
    assert sections.report_only(suite_of(first=stopped), tmp_path) == 0
    assert "| a |" in (tmp_path / "report.md").read_text()


def test_no_cell_is_begun_after_the_limit(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(sections, "time", type("Clock", (), {"monotonic": staticmethod(lambda: now[0])}))

    def slow(names):
        for name in names:
            now[0] += 4
            yield cell(name, times={"jax_flash": summary(1e-3)})

    suite = suite_of(first=lambda: slow("ab"), second=lambda: slow("cde"), third=lambda: slow("f"))
    assert sections.run(suite, list(suite.sections), tmp_path, limit=10) == 0
    text = (tmp_path / "report.md").read_text()
    assert all(f"| {name} |" in text for name in "abc")
    assert "| d |" not in text
    assert "not measured, or in part: second, third" in capsys.readouterr().err


def test_a_section_that_fails_is_a_cell():
    def fails():
        yield cell("a", times={})
        raise ValueError("no such kernel")

    first, second = suite_peers.kept(fails, "some")()
    assert first["name"] == "a"
    assert second["error"] == "ValueError: no such kernel"
    assert "no such kernel" in suite_peers.verdict(second)


def test_the_order_has_every_section_once():
    assert len(suite_peers.ORDER) == len(set(suite_peers.ORDER)) == len(suite_peers._ALL)


def test_the_plain_run_writes_a_section_for_each_pass_and_keeps_those_of_earlier_runs(
    small, tmp_path, capsys
):
    options = [
        "--cases",
        "2 packed|b1 s2048 h8/2 d128 float32 causal",
        "--peers",
        "xla,torch",
        "--out",
        str(tmp_path),
    ]
    assert __main__.main([*options, "--passes", "forward"]) == 0
    assert __main__.main([*options, "--passes", "jvp"]) == 0
    kept = json.loads((tmp_path / "report.json").read_text())["sections"]
    assert list(kept) == ["forward", "jvp"]
    assert [len(section["cells"]) for section in kept.values()] == [1, 1]
    text = (tmp_path / "report.md").read_text()
    assert "| forward | " in text
    assert "of the product, × xla " in text
    assert "## Bars" not in text
    assert "--passes jvp" in text


# --- cells ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["backward", "documents", "options d256", "options forward", "pairs", "short", "short forward", "latent"],
)
def test_attention_sections_run(small, name):
    """One section of each kind."""
    small.setattr(peer_attention, "PASSES", ("backward",))
    small.setattr(cases, "MATRIX", cases.MATRIX[:1] + cases.MATRIX[8:9])
    small.setattr(cases, "GQA", cases.GQA[:1])
    small.setattr(cases, "SMALL", cases.SMALL[:1])
    small.setattr(cases, "HEAD_DIMS", (64,))
    found = list(suite_peers.SECTIONS[name]())
    assert found
    assert all(c["kind"] != "failed" for c in found), found
    for c in found:
        assert any("median" in t for t in c["times"].values()), c
        assert suite_peers.verdict(c)
    peer = [c for c in found if c["kind"] == "peer"]
    assert all("median" in c["times"]["jax_flash"] for c in peer)
    assert all("refused" in c["times"][name] for c in peer for name in ("cudnn", "jla") if name in c["times"])
    judged = {bar.name for bar in bars_peers.judge(found)}
    wanted = {"options forward": "forward bias d64 / plain", "pairs": "backward s 777 / plain"}
    assert wanted.get(name) in {None, *judged}


def test_programs_are_compiled_in_waves_and_freed_with_their_last_cell(small):
    waves = []
    prepare = peers.prepare
    small.setattr(peers, "prepare", lambda what, **o: (waves.append(len(what)), prepare(what, **o))[1])
    small.setattr(peer_attention, "WAVE", 2)
    plain = cases.gpu_case(64, 1024)
    others = [plain.replace(name=f"other {n}") for n in range(3)]
    wanted = [
        peer_attention.Wanted(
            {"plain": ("jax_flash", plain, "forward"), "this": ("jax_flash", other, "forward")}
        )
        for other in others
    ]
    found = list(peer_attention.measured(wanted))
    assert waves == [3, 2]
    assert [set(c["times"]) for c in found] == [{"plain", "this"}] * 3


def test_gradients_of_sinks_and_of_a_bias_are_part_of_the_backward():
    case = tiny(cases.gpu_options(64)["sinks"]).replace(dtype="float32")
    call, arguments = peers.calls("jax_flash", case, "backward", peers.draw_inputs(case)[:1])
    *_, others = call(*arguments[0])
    assert set(others) == {"sinks"}


def test_the_hosts_time_is_measured_for_each_implementation_that_runs(small):
    case = tiny(cases.small_case(128, 512, False))
    small.setattr(cases, "small_case", lambda *size: case)
    small.setattr(host_time, "CHAIN", 2)
    small.setattr(host_time, "NO_GRAPHS", {})
    small.setattr(host_time, "_busy", lambda: None)
    small.setattr(host_time, "_host_time", lambda busy, call, arguments: {"host": 2e-6, "issue": 1e-6})
    found = list(suite_peers.SECTIONS["host"]())
    assert [c["name"] for c in found] == ["host time, launched one by one", "host time, in command buffers"]
    for c in found:
        assert {name for name, t in c["times"].items() if "median" in t} == {"jax_flash"}
        assert suite_peers.verdict(c) == "microseconds: jax_flash 2.0"


TINY_DECODE = (2, 4, 2, 16, 128)


@pytest.fixture
def small_decode(small):
    shapes = (TINY_DECODE, (*TINY_DECODE[:4], 64))
    small.setattr(cases, "DECODE", shapes)
    small.setattr(peer_decode, "ONE", shapes[:1])
    small.setattr(peer_decode, "MANY", (4, 4, 2, 16, 64))
    small.setattr(peer_decode, "KINDS", TINY_DECODE)
    small.setattr(peer_decode, "RAGGED", (2, 4, 2, 16, 256))
    small.setattr(peer_decode, "LONG", 100)
    small.setattr(peer_decode, "READ_ROW", 64)
    return small


@pytest.mark.parametrize("name", ["decode", "append"])
def test_decode_sections_run(small_decode, name):
    found = list(suite_peers.SECTIONS[name]())
    assert all(c["kind"] == "bandwidth" for c in found), found
    for c in found:
        ours = {
            n: t
            for n, t in c["times"].items()
            if "pallas" not in n and n not in ("cudnn", "window 128, sinks, d64")
        }
        assert all("median" in t for t in ours.values()), ours
        assert "µs" in suite_peers.verdict(c)
    bars_peers.judge(found)


def test_ragged_pages_hold_each_sequence_once():
    (_, (_, k, _, tables, lengths)), mean = decode_calls.ragged(jax_flash, (4, 4, 2, 16, 512))
    used = [page for row, n in zip(tables, lengths, strict=True) for page in row[: -(-int(n) // 64)].tolist()]
    assert sorted(used) == list(range(k.shape[0]))
    assert mean == pytest.approx(float(lengths.mean()))


def test_a_streaming_read_reads_every_word_in_every_call(small_decode):
    call, arguments = peer_decode.streaming_read(TINY_DECODE)
    text = jax.jit(lambda *x: call(call(*x), *x[1:])).lower(*arguments).as_text()
    assert text.count("stablehlo.reduce") == 8  # two of each array, in both calls


# --- whole steps ------------------------------------------------------------------------------------------------------


def test_every_way_of_attention_makes_the_same_training_step(small):
    """Layers have sinks, one a window and one none. With documents fewer keys are visible, so the loss differs."""
    pytest.importorskip("flax")
    pytest.importorskip("optax")
    sizes = step_training.Sizes(32, 4, 2, 16, 64, 2, windows=(8, None), sinks=True)
    calls, refused = step_training.steps(sizes, ("jax_flash, results kept", "xla", "cudnn"), 2, 32)
    assert set(refused) == {"cudnn"}  # cuDNN does not run on a CPU
    losses = {name: [float(call()) for _ in range(2)] for name, (call, _) in calls.items()}
    assert losses["jax_flash, results kept"] == pytest.approx(losses["xla"], rel=2e-2)
    assert losses["xla"][1] < losses["xla"][0]
    cell = step_training.step_cell("documents", sizes, ("jax_flash, documents",), 2, 32)
    assert "thousand tokens/s: jax_flash, documents" in bars_peers.verdict(cell)


def test_a_serving_step_runs_with_and_without_attention(small):
    sizes = step_serving.Sizes(
        layers=2, width=32, heads=4, kv_heads=2, head_dim=16, hidden=64, vocabulary=64, sequences=3, keys=40, page=4,
        dtype="float32",
    )  # fmt: skip
    (found,) = step_serving.serving_cells(sizes)
    assert {name for name, t in found["times"].items() if "median" in t} == {"jax_flash", "no attention"}
    assert "attention's share" in bars_peers.verdict(found)


def test_thunks_inside_command_buffers_are_counted():
    text = "000: kCommandBuffer x\n  000: kGemm a\n  001: kCustomCall b\n001: kCopy c\n"
    assert step_serving.captured_calls(text) == {"inside": 2, "outside": 1}


# --- peers ------------------------------------------------------------------------------------------------------------


def test_tokamax_gets_a_stand_in_for_what_it_imports_for_its_own_benchmarks(monkeypatch):
    for name in ("xprof", "xprof.cli", "xprof.cli.tools"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(adapters, "jax_nn", lambda *names: lambda case: names)
    for _ in range(2):
        assert adapters.tokamax(cases.gpu_case(64, 1024)) == ("mosaic", "tokamax")
    if not getattr(sys.modules["xprof"], "__file__", None):
        assert hasattr(sys.modules["xprof.cli.tools"], "get_kernel_stats_tool")
        for name in ("xprof", "xprof.cli", "xprof.cli.tools"):
            del sys.modules[name]


# --- bars and plots ---------------------------------------------------------------------------------------------------


def test_bars_and_plots_of_a_run():
    plt = pytest.importorskip("matplotlib.pyplot")
    found = [
        cell(case.name, d=case.d, s=case.sq, causal=case.causal, **{"pass": pass_})
        | {"times": {"jax_flash": summary(1.0), "cudnn": summary(1.3), "tokamax": {"refused": "no"}}}
        for case in (*cases.MATRIX, *cases.GQA)
        for pass_ in ("forward", "backward")
    ]
    times = {
        "contiguous": 1.0,
        "pages of 64": 1.01,
        "pages of 16": 1.0,
        "cudnn": 1.05,
        "read": 0.97,
        "pallas, pages of 16": 2.5,
    }
    found += [
        {"kind": "bandwidth", "of": "long", "name": cases.decode_name(shape), "shape": shape}
        | {"bytes_read": dict.fromkeys(times, 1e9), "times": {n: summary(t * 1e-3) for n, t in times.items()}}
        for shape in cases.DECODE[:3]
    ]
    bars = {bar.name: bar for bar in bars_peers.judge(found)}
    assert bars["backward × cuDNN"].value == pytest.approx(1.3)
    assert bars["decode, contiguous × cuDNN"].met
    assert not bars["backward d256 × cuDNN, each shape"].value < 1.3
    assert bars["decode, pages × Pallas"].value == pytest.approx(2.5)
    for draw in suite_peers.FIGURES.values():
        figure = draw(found, plt)
        assert figure is not None
        plt.close(figure)
    assert peer_figures.first_page([], plt) is None


def test_the_plot_keeps_the_ratio_of_a_peer_from_another_cell():
    cell = {"kind": "peer", "case": "d64 s1024", "pass": "forward", "flop": 1e12}
    first = {"jax_flash": summary(1.0), "cudnn": summary(2.0)}
    later = {"jax_flash": summary(0.8), "cudnn": summary(2.0), "fa4-jax": summary(1.6)}
    found = peer_figures.peer_rows([cell | {"times": first}, cell | {"times": later}], "forward")
    assert found == [("d64 s1024", {"jax_flash": 1.0, "cudnn": 0.5, "fa4-jax": 0.5})]
