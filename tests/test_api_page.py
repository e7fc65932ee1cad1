"""docs/api.md names every public function and every option."""

import inspect
import re
from pathlib import Path

import pytest

import jax_flash

PAGE = (Path(__file__).parent.parent / "docs" / "api.md").read_text()
WORDS = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", PAGE))))
PUBLIC = [name for name in jax_flash.__all__ if callable(getattr(jax_flash, name))]


@pytest.mark.parametrize("name", PUBLIC)
def test_the_page_names(name):
    function = getattr(jax_flash, name)
    options = set() if inspect.isclass(function) else set(inspect.signature(function).parameters)
    assert {name, *options} <= WORDS
