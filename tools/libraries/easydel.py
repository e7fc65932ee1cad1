"""EasyDeL: calls of ejkernel's functions and of its operation, which its models use, compared with `compat.easydel`.

ejkernel's tests are in its repository alone: where a clone is given, those of flash attention run with ours.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ejkernel import modules
from ejkernel.types import MaskInfo

from jax_flash.compat import easydel

from .common import Comparison, Library

OLDER = "tests older than 0.0.78, with sinks of a shape that it refuses"
EXPECTED = {
    "*TestSoftmaxAux::test_attention_sinks_*": OLDER,
    "*test_different_sink_sizes": OLDER,
    "*test_soft_cap_and_sinks": OLDER,
    "*test_all_features": OLDER,
    "*test_gradients_with_all_features": OLDER,
}
B, S, HQ, HK, D = 2, 48, 4, 2, 32
TESTS = "test_it_is_ejkernel_s_own", "test_easydel_s_operation_runs_here"


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def calls() -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments after query, key and value, and options, of `flash_attention`."""
    ids = jnp.asarray(np.repeat([[0, 1, 2], [0, 0, 1]], 16, axis=1), jnp.int32)
    bias, sinks = normal(4, B, HQ, S, S), normal(5, HQ)
    dense = jax.random.bernoulli(jax.random.key(6), 0.7, (B, 1, S, S))
    return {
        "plain": ((), {}),
        "causal": ((), dict(causal=True)),
        "window": ((), dict(causal=True, sliding_window=(7, 0))),
        "a window to both sides": ((), dict(sliding_window=(5, 9))),
        "scale": ((), dict(softmax_scale=0.3)),
        "soft cap": ((), dict(logits_soft_cap=1.5)),
        "bias": ((bias,), {}),
        "bias and soft cap": ((bias,), dict(logits_soft_cap=1.5, causal=True)),
        "sinks": ((None, None, None, sinks), dict(causal=True)),
        "segments": ((), dict(mask_info=MaskInfo.from_segments(ids), causal=True)),
        "a mask": ((), dict(mask_info=MaskInfo(_attention_mask=dense))),
    }


def ours_as_kernel(comparison: Comparison, own: Any) -> Any:
    """ejkernel's kernel for XLA, whose arguments have another order, with our function."""

    def ours(query: Any, key: Any, value: Any, bias: Any, mask: Any, aux: Any, **named: Any) -> Any:
        info = None if mask is None else MaskInfo(_attention_mask=mask)
        return easydel.flash_attention(query, key, value, bias, None, None, aux, mask_info=info, **named)

    def theirs(query: Any, key: Any, value: Any, bias: Any, mask: Any, aux: Any, **named: Any) -> Any:
        return own(query, key, value, mask, bias, softmax_aux=aux, **named)

    def call(
        query: Any, key: Any, value: Any, attention_mask: Any = None, bias: Any = None, **named: Any
    ) -> Any:
        for chunk in ("chunk_size_q", "chunk_size_k"):
            named.pop(chunk, None)
        rest = bias, attention_mask, named.pop("softmax_aux", None)
        return comparison.beside(ours, theirs)(query, key, value, *rest, **named)

    return call


def pages(name: str) -> None:
    """Compares a function of ejkernel over pages with ours."""
    lens, size = jnp.array([19, 33], jnp.int32), 8
    tables = jnp.array([[3, 1, 7, 0, 0], [2, 4, 9, 8, 6]], jnp.int32)
    starts = jnp.array([0, 5, 6], jnp.int32)
    q, k, v = normal(1, 6, HQ, 128), normal(2, 6, HK, 128), normal(3, 6, HK, 128)
    pool = normal(4, 10, size, 2 * HK, 128)
    arrays: dict[str, tuple[Any, ...]] = {
        "ragged_page_attention_v2": (q, pool, lens, tables, starts, jnp.array([2], jnp.int32), None),
        "ragged_page_attention_v3": (
            *(q / 11, k, v, pool.reshape(10, size, 2 * HK, 1, 128), lens, tables.ravel(), starts),
            *(jnp.array([0, 0, 2], jnp.int32), None),
        ),
        "unified_attention": (q, pool[:, :, ::2], pool[:, :, 1::2], lens, tables, starts),
    }
    exact = {"compute_dtype": jnp.float32} if name == "ragged_page_attention_v2" else {}
    for options in ({}, dict(sliding_window=9), dict(logits_soft_cap=1.5), dict(softmax_scale=0.1)):
        if "sliding_window" in options and name == "ragged_page_attention_v3":
            continue  # its kernel for XLA drops keys that the first rows of a chunk see
        ours = getattr(easydel, name)(*arrays[name], **options)
        copies = [jnp.copy(x) if isinstance(x, jax.Array) else x for x in arrays[name]]  # they may be donated
        theirs = getattr(modules, name)(*copies, **options, **exact, platform="xla")
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=5e-5, atol=5e-5)


def main() -> int:
    library = Library("easydel", "easydel", EXPECTED)
    comparison = Comparison()
    q, k, v = normal(1, B, S, HQ, D), normal(2, B, S, HK, D), normal(3, B, S, HK, D)

    def same(ours: Any, theirs: Any, rest: tuple[Any, ...], named: dict[str, Any]) -> None:
        before = comparison.made, comparison.close
        comparison.beside(ours, partial(theirs, platform="xla"))(q, k, v, *rest, **named)
        jax.effects_barrier()
        assert (comparison.made - before[0], comparison.close - before[1]) == (1, 1), (
            f"{comparison.worst:.1f}"
        )

    for name, call in calls().items():
        library.case(name, partial(same, easydel.flash_attention, modules.flash_attention, *call))
        scaled = easydel.scaled_dot_product_attention, modules.scaled_dot_product_attention
        if len(call[0]) < 2 and "logits_soft_cap" not in call[1]:
            library.case(f"scaled dot products, {name}", partial(same, *scaled, *call))
    for name in ("ragged_page_attention_v2", "ragged_page_attention_v3", "unified_attention"):
        library.case(name, partial(pages, name))
    library.our_tests(*(f"test_compat_easydel.py::{test}" for test in TESTS))
    if "LIBRARY_CHECKOUT" in os.environ:
        kernel: Any = import_module("ejkernel.kernels._xla.flash_attention")
        kernel.flash_attention = ours_as_kernel(comparison, kernel.flash_attention)
        folder = Path(os.environ["LIBRARY_CHECKOUT"]) / "test" / "kernels" / "_xla"
        library.pytest(
            folder / "test_flash_attention.py", options=["--noconftest", "--import-mode=importlib"]
        )
    return library.report(comparison)


if __name__ == "__main__":
    sys.exit(main())
