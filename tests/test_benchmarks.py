"""benchmarks/: in which order calls are timed, what is counted as FLOP, and how two checkouts share a process."""

import itertools
import subprocess
import sys
from pathlib import Path

import checkout  # noqa: F401
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import IMPLEMENTATION

import jax_flash
from benchmarks import (
    compare,
    compare_cells,
    flop,
    masks,
    measure,
    other_checkout,
    peers,
    tune,
)
from benchmarks.cases import Case, varlen


class Clock:
    """A device on which a call takes a given time. `log` lists the calls that ran."""

    def __init__(self, monkeypatch):
        self.now, self.log = 0.0, []
        monkeypatch.setattr(measure, "time", self)

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def call(self, name, seconds):
        def run(argument):
            self.now += seconds
            self.log.append((name, argument))
            return argument

        return run


def test_the_command_starts_without_the_tests_on_the_path():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--help"], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )  # fmt: skip
    assert "--compare" in done.stdout, done.stderr


def test_turns_are_rotated_and_reversed():
    names = ["a", "b", "c"]
    turns = [measure.order(names, repeat) for repeat in range(6)]
    assert turns[:4] == [["a", "b", "c"], ["c", "b", "a"], ["b", "c", "a"], ["a", "c", "b"]]
    for place in range(3):
        assert {turn[place] for turn in turns} == set(names)
    for one, other in itertools.combinations(names, 2):
        assert sum(turn.index(one) < turn.index(other) for turn in turns) == 3


def test_a_burst_follows_as_many_untimed_calls_of_the_same_implementation(monkeypatch):
    clock = Clock(monkeypatch)
    seconds = {"short": 1 / 1024, "long": 4 / 1024}  # sums of these are exact
    calls = {name: (clock.call(name, each), [(0,)]) for name, each in seconds.items()}
    times = measure.interleaved(calls, repeats=2, seconds=20 / 1024)
    assert times == {name: [each] * 2 for name, each in seconds.items()}
    runs = [(name, len(list(run))) for name, run in itertools.groupby(name for name, _ in clock.log)]
    # Calls before the last three runs find how many calls fill a burst. The turns are short, long, long, short.
    assert runs[-3:] == [("short", 2 * 20), ("long", 2 * 2 * 5), ("short", 2 * 20)]


def test_settle_bounds_the_untimed_calls_by_seconds(monkeypatch):
    clock = Clock(monkeypatch)
    measure.interleaved({"": (clock.call("", 0.001), [(0,)])}, repeats=1, seconds=0.02, settle=0.005)
    with_settling = len(clock.log)
    clock.log.clear()
    measure.interleaved({"": (clock.call("", 0.001), [(0,)])}, repeats=1, seconds=0.02, settle=0)
    assert with_settling - len(clock.log) > 5  # the 5 calls, and those that found that 5 are needed


def test_arguments_are_rotated(monkeypatch):
    clock = Clock(monkeypatch)
    measure.interleaved({"": (clock.call("", 0.001), [(0,), (1,), (2,)])}, repeats=1, seconds=0.006)
    assert [argument for _, argument in clock.log[:6]] == [0, 1, 2, 0, 1, 2]


def test_masks_biases_and_segments_take_no_pair_away_and_the_band_does():
    plain = Case("", sq=5, sk=7, causal=True, kv_lengths=(3, 7), q_lengths=(5, 2))
    hidden = plain.replace(mask=(5, 7), bias=(5, 7), segments=2, sinks=True, dropout_rate=0.1)
    assert flop.attention(hidden, "forward") == flop.attention(plain, "forward")
    assert flop.attention(plain, "forward") == 4 * 16 * 4 * ((1 + 2 + 3) + (6 + 7))
    packed = varlen("", (3, 2), k_sequences=(4, 1), padding=(3, 2))
    assert flop.attention(packed, "forward") == 4 * 16 * 4 * (12 + 2)


def test_flop_are_four_b_h_s_s_d_and_the_backward_two_and_a_half_times_that():
    case = Case("", b=2, sq=8, sk=8, hq=3, hk=1, d=16, dv=16)
    assert flop.attention(case, "forward") == 4 * 2 * 3 * 8 * 8 * 16
    assert flop.attention(case, "backward") == 2.5 * flop.attention(case, "forward")
    assert flop.attention(case, "both") == 3.5 * flop.attention(case, "forward")
    assert flop.attention(case, "jvp") == 3.5 * flop.attention(case, "forward")
    assert (
        flop.kv_bytes(sequences=2, kv_heads=8, head_dim=128, keys=10, itemsize=2) == 2 * 2 * 8 * 128 * 10 * 2
    )


@pytest.mark.parametrize("name", masks.AS_ARRAYS)
def test_the_array_of_a_mask_shows_the_pairs_whose_flop_its_rate_counts(name):
    size, d = 256, 16
    mask = masks.cases(size, heads=4)[name][0]["mask"]
    x = jnp.zeros((masks.BATCH, size, 1, d))
    pairs = masks.BATCH * int(masks.array_of(mask, size).sum())
    assert jax_flash.flops(jax_flash.flash_attention, x, x, x, mask=mask) == 4 * d * pairs


def test_a_peer_that_cannot_run_a_case_says_why():
    case = Case("", sq=8, sk=8, window=(2, 0), softcap=3.0, dtype="bfloat16")
    platform = jax.default_backend()
    lacking = peers.Peer({"GQA"}, (platform,), lambda case: None)
    absent = peers.Peer(None, (platform,), lambda case: None, "no_such_module")
    elsewhere = peers.Peer(None, ("tpu",), lambda case: None)
    for peer, reason in (
        (lacking, "lacks softcap, window"),
        (absent, "no_such_module is not installed"),
        (elsewhere, "runs on tpu"),
    ):
        with pytest.raises(peers.Refused, match=reason):
            peer.attend(case)


TABLE = """\
// JF_KERNEL(arch, pass, loader, element, d, dv, block_m)
JF_KERNEL(sm80, forward,  both,  half,   64,  64,  128)
JF_FALLBACK(sm80, forward, both, half,   64,  64,  64)
JF_KERNEL(sm90, forward,  paged, half,   64,  64,  192)
JF_KERNEL(sm80, forward,  both,  half,   128, 128, 128)
JF_KERNEL(sm80, backward, dense, half,   64,  64,  128)
"""


def test_a_candidate_stands_in_the_place_of_the_rows_like_it():
    names = tune.columns(TABLE)
    dense = tune.parse_rows("JF_KERNEL(sm80, forward, dense, half, 64, 64, 32)", names)
    lines = TABLE.splitlines()
    assert tune.table_with(dense, TABLE).splitlines() == [
        lines[0],
        *lines[3:],
        "JF_KERNEL(sm80, forward, dense, half, 64, 64, 32)",
    ]
    two = tune.parse_rows(
        "sm80, forward, both, half, 64, 64, 32; sm80, forward, both, half, 64, 64, 16", names
    )
    assert len(tune.table_with(two, TABLE).splitlines()) == len(lines) - 3 + 2
    with pytest.raises(ValueError, match=r"columns arch, pass.*got 'sm80, forward'"):
        tune.parse_rows("sm80, forward", names)


def test_a_row_of_the_kernel_table_can_be_a_candidate():
    table = tune.TABLE.read_text()
    row = next(line for line in table.splitlines() if line.startswith("JF_KERNEL(sm80, forward"))
    candidate = tune.parse_rows(row, tune.columns(table))
    assert tune.table_with(candidate, table).endswith(f"JF_KERNEL({', '.join(candidate[0].values())})\n")


def test_cells_of_a_comparison_have_names_of_their_own():
    for platform in ("cpu", "gpu"):
        names = [cell.name for cell in compare_cells.of_platform(platform)]
        assert len(names) == len(set(names)) > 50


def test_a_comparison_is_met_where_nothing_is_slower_and_no_bit_differs():
    def result(ratio, bits="same"):
        return {"ratio": ratio, "bits": bits}

    assert compare.summary({"a": result(0.98), "b": result(1.02)})["met"]
    slow = compare.summary({"a": result(0.96), "b": result(1.1)})
    assert not slow["met"]
    assert slow["slower"] == ["a"]
    assert slow["worst"] == ["a", 0.96]
    assert not compare.summary({"a": result(0.99), "b": result(0.99)})["met"]  # the mean is below 1
    assert not compare.summary({"a": result(1.0, "differ")})["met"]
    found = compare.summary({"a": result(1.0), "b": {"error": "not built"}})
    assert found["errors"] == ["b"]


def test_bits_tell_zeros_and_nans_apart():
    x = jax.numpy.array([0.0, np.nan])
    assert compare.same_bits([x], [x])
    assert not compare.same_bits([x], [-x])
    assert not compare.same_bits([x], [x.astype("float16")])


@pytest.mark.skipif(IMPLEMENTATION != "cpu", reason="loads the CPU's library twice")
def test_two_packages_run_in_one_process(tmp_path):
    if jax_flash.backends()[0].problem:
        pytest.skip("no library is built here")
    package = tmp_path / "jax_flash"
    package.mkdir()
    for path in Path(jax_flash.__file__).parent.iterdir():
        (package / path.name).symlink_to(path)
    library = jax_flash.backends()[0].library  # the editable package, whose library the copy uses
    if not (package / library.name).exists():
        (package / library.name).symlink_to(library)
    before = other_checkout.load(tmp_path, "jax_flash_of_this_test")
    x = jax.random.normal(jax.random.key(0), (1, 8, 2, 16))

    def lowered(package):
        return jax.jit(lambda q: package.flash_attention(q, q, q, causal=True)).lower(x)

    here, there = lowered(jax_flash), lowered(before)
    assert "@jax_flash_forward" in here.as_text()
    assert "@jax_flash_of_this_test_jax_flash_forward" in there.as_text()
    assert compare.same_bits(here.compile()(x), there.compile()(x))
