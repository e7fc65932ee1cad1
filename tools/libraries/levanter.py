"""Levanter: its attention tests, with the adapter in place of its `dot_product_attention`."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import types
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import haliax
import jax.numpy as jnp
import pytest
from haliax import Axis

from jax_flash.compat.levanter import dot_product_attention

from .common import Comparison, Library, bare

CHECKOUT = os.environ.get("LIBRARY_CHECKOUT")
if CHECKOUT:  # its tests belong to the checkout's functions, not to the version on PyPI
    sys.path.insert(0, f"{CHECKOUT}/src")
for package in ("levanter", "levanter.models"):  # their own __init__ imports training and data loading
    bare(package)
from levanter.layers import attention as own  # noqa: E402

EXPECTED: dict[str, str] = {}
B, H, G, P, D = (
    Axis(*x) for x in (("batch", 2), ("kv_head", 2), ("group", 3), ("position", 48), ("head_size", 32))
)
KP = P.alias("key_position")


def calls() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Masks and options of the calls that are compared with Levanter's own attention."""
    causal, random = own.AttentionMask.causal, haliax.random.normal
    key = own.jrandom.key(1)
    ids = haliax.named(jnp.stack([jnp.arange(48) // 20, jnp.arange(48) // 31]), (B, P))
    return {
        "plain": (None, {}),
        "causal": (causal(), {}),
        "window": (causal(sliding_window=9), {}),
        "offset": (causal(offset=3), {}),
        "offsets of entries": (causal(offset=haliax.named(jnp.array([2, 5]), B)), {}),
        "segments": (causal().with_segment_ids(ids), {}),
        "an array": (haliax.random.bernoulli(key, (B, P, KP), 0.7), {}),
        "bias": (causal(), dict(bias=random(key, (G, P, KP)))),
        "sinks": (causal(), dict(attn_sink=random(key, (H, G)))),
        "scale": (causal(), dict(scaling_factor=0.3)),
        "soft cap": (causal(), dict(logits_soft_cap=2.0)),
        "bias before the soft cap": (causal(), dict(bias=random(key, (P, KP)), logits_soft_cap=2.0)),
    }


def compare(comparison: Comparison, mask: Any, options: dict[str, Any]) -> None:
    """Compares results and gradients of a call with those of Levanter's plain attention."""
    arrays = [
        haliax.random.normal(own.jrandom.key(i), axes)
        for i, axes in enumerate(((B, H, G, P, D), (B, H, KP, D), (B, H, KP, D)))
    ]
    cotangent = haliax.random.normal(own.jrandom.key(9), (B, H, G, P, D))
    results: list[list[Any]] = []
    plain = dict(attn_backend=own.AttentionBackend.VANILLA, precision="highest")
    for function, named in ((dot_product_attention, {}), (own.dot_product_attention, plain)):

        def run(*x: Any, function: Any = function, named: Any = named) -> Any:
            return function(P, KP, D, *x, mask, **options, **named)

        out, pullback = own.jax.vjp(run, *arrays)
        results.append([out, *pullback(cotangent)])
    assert all(ours.axes == theirs.axes for ours, theirs in zip(*results))
    close = comparison.close
    largest = [float(jnp.abs(x.array).max()) for x in arrays]
    comparison.record(max(largest[:2]) * largest[2], *([x.array for x in found] for found in results))
    assert comparison.close > close, f"{comparison.worst:.1f} tolerances"


def flash_attention(
    *arguments: Any, key: Any = None, block_size: Any = None, dtype: Any = None, **named: Any
) -> Any:
    """Levanter's flash attention, whose options have other names."""
    del block_size, dtype
    return dot_product_attention(*arguments, prng=key, **named)


def main() -> int:
    library = Library("levanter", "" if CHECKOUT else "marin-levanter", EXPECTED)
    comparison = Comparison()
    known = inspect.signature(own.dot_product_attention).parameters
    for name, call in calls().items():
        if not call[1].keys() <= known.keys():
            continue
        library.case(name, partial(compare, comparison, *call))
    if CHECKOUT:
        tests = Path(CHECKOUT) / "tests"
        # Their own test_utils imports training code; the tests need only two decorators.
        utils = types.ModuleType("test_utils")
        utils.skip_if_module_missing = lambda name: pytest.mark.skipif(not find_spec(name), reason=name)  # type: ignore[attr-defined]
        utils.skip_if_no_torch = pytest.mark.skipif(not find_spec("torch"), reason="no torch")  # type: ignore[attr-defined]
        sys.modules[utils.__name__] = utils
        flash = importlib.import_module("levanter.models.flash_attention")
        own.dot_product_attention = dot_product_attention
        setattr(flash, "flash_attention", flash_attention)  # noqa: B010
        library.pytest(
            tests / "test_attention.py", tests / "test_flash_attention.py", options=["--noconftest"]
        )
    return library.report(comparison)


if __name__ == "__main__":
    sys.exit(main())
