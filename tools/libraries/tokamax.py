"""tokamax: its attention tests, with `tokamax_attention` as the implementation that it calls."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tokamax._src.ops.attention import api_test, test_base

from jax_flash.compat.tokamax import tokamax_attention

from .common import Library

EXPECTED = {
    "*test_normalize_output": "unnormalised sums without their maximum",
    "*test_quantized_int*": "quantised arrays",
    "*test_dropout": "dropout by an array",
    "*test_small_sequences1": "float32 sums, up to 2.6e-5 off",
    "*test_bias2": "float32 sums, up to 2.6e-5 off",
    "*OfItsFunction::test_dot_product_attention?": "looks for tokamax's own operation",
    "*OfItsFunction::test_dot_product_attention1?": "looks for tokamax's own operation",
}


class TestImplementation(test_base.AttentionTestBase):
    """What tokamax asks of every implementation."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments, attention_fn=tokamax_attention)


class TestOfItsFunction(api_test.DotProductAttentionTest):
    """`tokamax.dot_product_attention(…, implementation=[tokamax_attention])`."""

    IMPL = (tokamax_attention,)


def main() -> int:
    library = Library("tokamax", "tokamax", EXPECTED)
    library.pytest(Path(__file__))
    return library.report()


if __name__ == "__main__":
    sys.exit(main())
