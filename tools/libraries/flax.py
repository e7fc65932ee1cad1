"""Flax: the attention tests of linen and nnx, with `jax_flash.flax.attention_fn` in place of their attention."""

from __future__ import annotations

import sys
from typing import Any

from flax import linen, nnx

from jax_flash.flax import attention_fn

from .common import Comparison, Library, replace, source

EXPECTED = {
    "*test_dtype_infer": "complex numbers",
}


def beside_own(comparison: Comparison, function: Any) -> None:
    """Replaces an attention function of Flax by ours, and compares both in every call that both support."""

    def theirs(*arguments: Any, **named: Any) -> Any:
        return kept(*arguments, **named)

    def call(*arguments: Any, **named: Any) -> Any:
        dropout = not named.get("deterministic") and named.get("dropout_rate", 0.0) != 0.0
        other = named.get("module") or named.get("promote_dtype")
        run = attention_fn if dropout or other else both
        return run(*arguments, **named)

    both = comparison.beside(attention_fn, theirs)
    kept = replace(function, call)


def main() -> int:
    library = Library("flax", "flax", EXPECTED)
    comparison = Comparison()
    for function in (linen.dot_product_attention, nnx.dot_product_attention):
        beside_own(comparison, function)
    tests = source() / "tests"
    library.pytest(tests / "linen" / "linen_attention_test.py", tests / "nnx" / "nn" / "attention_test.py")
    return library.report(comparison)


if __name__ == "__main__":
    sys.exit(main())
