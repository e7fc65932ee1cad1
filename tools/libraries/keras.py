"""Keras: the tests of its attention layers and of its operation, with the adapter in place of its JAX backend's."""

from __future__ import annotations

import sys
from pathlib import Path

import keras
from keras.src.backend.jax import nn

from jax_flash.compat.keras import dot_product_attention

from .common import Comparison, Library

EXPECTED: dict[str, str] = {}


def main() -> int:
    library = Library("keras", "keras", EXPECTED)
    comparison = Comparison()
    library.our_tests("test_compat_keras.py::test_it_is_keras_s_own")
    nn.dot_product_attention = comparison.beside(dot_product_attention, nn.dot_product_attention)
    tests = Path(keras.__file__).parent / "src"
    layers = tests / "layers" / "attention"
    library.pytest(
        layers / "multi_head_attention_test.py",
        layers / "grouped_query_attention_test.py",
        tests / "ops" / "nn_test.py",
        options=["-k", "attention"],
    )
    return library.report(comparison)


if __name__ == "__main__":
    sys.exit(main())
