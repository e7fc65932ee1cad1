"""tpu-inference: its tests of ragged paged attention (v2, v3 and hd64), with our adapter in place of its TPU kernels.

Its tests allow errors of .15 and more, because its reference rounds scores to 16 bits. So calls in float32 are also
compared with it to 5e-5.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import test_util

from jax_flash.compat.ragged_paged_attention import ragged_paged_attention, ragged_paged_attention_update

from .common import Comparison, Library, bare

EXPECTED: dict[str, str] = {}
SCORES = 5e-5  # allowed error: unscaled scores over 128 columns reach 64, whose last bit is 8e-6


def beside_own(
    comparison: Comparison, ours: Callable[..., Any], theirs: Callable[..., Any]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Both functions, which compare their results in float32 when a test calls them, one after the other. There are no
    gradients."""
    waiting: dict[str, list[Any]] = {}

    def call(*arrays: Any, which: str, run: Callable[..., Any], **named: Any) -> Any:
        results = run(*arrays, **named)
        if all(x is None or x.dtype in (jnp.float32, jnp.int32) for x in arrays):
            waiting[which] = jax.tree.leaves(results)
        if len(waiting) == 2:
            found, expected = waiting.pop("ours"), waiting.pop("theirs")
            found[0] = found[0][: expected[0].shape[0]]  # the reference has no rows outside the sequences
            # Slots that nothing was written to are NaN.
            comparison.record(0.0, *([jnp.nan_to_num(x) for x in y] for y in (found, expected)), grads=0)
        return results

    return partial(call, which="ours", run=ours), partial(call, which="theirs", run=theirs)


def main() -> int:
    bare("tpu_inference")
    # This module imports vLLM, and only a TPU kernel needs it.
    tuned = types.ModuleType("tpu_inference.kernels.ragged_paged_attention.v3.tuned_block_sizes_hd64")
    tuned.get_tuned_block_sizes = None  # type: ignore[attr-defined]
    sys.modules[tuned.__name__] = tuned
    from tpu_inference.kernels.ragged_paged_attention.v2 import kernel as v2
    from tpu_inference.kernels.ragged_paged_attention.v3 import kernel as v3
    from tpu_inference.kernels.ragged_paged_attention.v3 import kernel_hd64 as hd64

    comparison = Comparison(SCORES)
    update = ragged_paged_attention_update
    for module, name, ours in (
        (v2, "ragged_paged_attention", ragged_paged_attention),
        (v3, "ragged_paged_attention", update),
        (hd64, "ragged_paged_attention_hd64", partial(update, layout="concatenated")),
    ):
        both = beside_own(comparison, ours, getattr(module, f"ref_{name}"))
        for attribute, function in zip((name, f"ref_{name}"), both):
            setattr(module, attribute, function)
    test_util.is_device_tpu_at_least = lambda version: True  # else the tests skip
    library = Library("tpu_inference", "tpu-inference", EXPECTED)
    tests = Path(sys.modules["tpu_inference"].__path__[0]).parent / "tests" / "kernels"
    names = [f"ragged_paged_attention_kernel_{x}_test.py" for x in ("v2", "v3", "v3_hd64")]
    library.pytest(*(tests / x for x in names), options=["--noconftest"])
    return library.report(comparison)


if __name__ == "__main__":
    sys.exit(main())
