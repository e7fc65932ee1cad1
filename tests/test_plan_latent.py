"""plan() chooses the kernels of latent pools, in which K and V share columns. Needs no GPU."""

from __future__ import annotations

import numpy as np
import pytest
from plans import A10, A100, H200, tile
from plans import plan_decode as plan

LATENT = {"heads": 128, "kv_heads": 1, "d": 576, "dv": 512, "value_dim": 512}


def test_latent_pools_have_kernels_of_their_own():
    for device, heads, arch, wanted in (
        (H200, 128, "sm90", (64, 64)), (H200, 17, "sm90", (64, 64)), (H200, 16, "sm90", (16, 32)),
        (A100, 128, "sm80", (64, 32)), (A100, 16, "sm80", (16, 32)), (A10, 128, "sm80", (16, 16)),
    ):  # fmt: skip
        chosen = plan(device, **LATENT | {"heads": heads})
        assert (chosen["row"]["arch"], chosen["row"]["pass"], tile(chosen)) == (arch, "decode", wanted)
    assert plan(**LATENT | {"d": 192, "dv": 128, "value_dim": 128, "heads": 8})["row"]["d"] == 192


@pytest.mark.parametrize("options", [{}, {"paged": False}, {"paged": False, "q_rows": 64}], ids=str)
@pytest.mark.parametrize("batch", [64, 256])
def test_keys_that_are_the_values_run_them_too(batch, options):
    """If V is the whole of K, in pages or, for few tokens, contiguous. Portable rows of 512 columns decode it."""
    sizes = {"batch": batch, "q_rows": 1, "heads": 64, "kv_heads": 1, "d": 512, "dv": 512}
    chosen = plan(**sizes | {"value_dim": 512} | options)
    row = chosen["row"]
    assert (row["arch"], row["design"], row["d"], tile(chosen)) == ("sm90", "latent", 512, (64, 64))
    few = plan(**sizes | {"value_dim": 512, "heads": 16} | options | {"q_rows": 1})["row"]
    assert (few["arch"], few["design"], few["d"]) == ("sm90", "latent_few", 512)
    apart = plan(**sizes | {"batch": 256} | options)["row"]
    assert not apart["design"].startswith("latent")


@pytest.mark.parametrize(
    "options",
    [{"q_rows": 65}, {"varlen": True, "q_rows": 64}, {"dtype": "float32"}, {"d": 256, "dv": 256, "value_dim": 256},
     {"heads": 0}, {"operands": ("bias",)}, {"operands": ("kv_segment_ids", "q_segment_ids")}],
    ids=str,
)  # fmt: skip
def test_other_contiguous_keys_that_are_the_values_do_not(options):
    sizes = {"q_rows": 1, "heads": 64, "kv_heads": 1, "d": 512, "dv": 512, "value_dim": 512, "paged": False}
    assert not plan(**sizes | options)["row"]["design"].startswith("latent")


def test_keys_and_values_beside_each_other_run_the_kernels_of_separate_pools():
    shared = {"value_dim": 64, "value_start": 64, "pool_columns": 128}
    for options in ({}, {"q_rows": 300}, {"float8": True}, {"capability": 80}):
        assert plan(**shared | options)["row"] == plan(**options)["row"]
    # The forward runs, because rows of 136 bytes do not all begin at multiples of 16, as bulk copies need.
    padded = plan(**shared | {"float8": True, "pool_columns": 136})
    assert padded["row"]["pass"] == "forward"
    for options in ({"value_start": 60}, {"pool_columns": 132}):
        with pytest.raises(RuntimeError, match="CUDA takes multiples of 8"):
            plan(**shared | options)
    with pytest.raises(RuntimeError, match=r'd=576, dv=512 on sm_.*implementation="xla" runs it'):
        plan(**LATENT | {"value_start": 64, "pool_columns": 576})


def test_latent_pools_are_decoded_however_many_rows_there_are():
    for options in ({"q_rows": 300}, {"q_rows": 700, "varlen": True}):
        chosen = plan(**LATENT | options)
        assert chosen["row"]["pass"] == "decode"
        assert "decode_row" not in chosen


@pytest.mark.parametrize(
    "options",
    [{"dtype": "float32"}, {"float8": True}, {"capability": 75, "dtype": "float16"}, {"value_dim": 0}],
    ids=str,
)
def test_what_latent_pools_lack_is_an_error_that_names_plain_jax(options):
    with pytest.raises(RuntimeError, match=r'd=576, dv=512 on sm_.*implementation="xla" runs it'):
        plan(**LATENT | options)


def test_the_error_of_latent_float8_pools_says_what_they_are():
    with pytest.raises(RuntimeError, match="paged forward of bfloat16 over float8 pools with d=576"):
        plan(**LATENT | {"float8": True})


def test_the_workspace_of_latent_pools_stays_within_its_bound():
    rng = np.random.default_rng(0)
    for _ in range(300):
        options = LATENT | {
            "kv_heads": int(rng.integers(1, 4)), "batch": int(rng.integers(1, 300)), "leading": int(rng.integers(1, 3)),
            "q_rows": int(rng.integers(1, 200)), "k_rows": int(rng.integers(0, 20000)),
            "varlen": bool(rng.random() < 0.5), "num_splits": int(rng.choice([0, 0, 3, 500])),
            "batch_invariant": bool(rng.random() < 0.3),
        }  # fmt: skip
        if rng.random() < 0.3:
            options |= {"paged": False, "varlen": False, "d": 512}
            options |= {"num_splits": 0, "batch_invariant": False}
        options["heads"] = options["kv_heads"] * int(rng.choice([1, 16, 24, 64, 72, 128]))
        device = (H200, A100, A10)[rng.integers(3)]
        chosen = plan(device, **options)
        assert chosen["workspace"] <= chosen["workspace_bound"], options
