"""The guides' code blocks run, one after another, as a reader would try them."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


def run(page: str) -> dict[str, object]:
    """Runs the page's code blocks; returns the variables that they define."""
    path = DOCS / page
    text = path.read_text()
    names: dict[str, object] = {"__name__": path.stem}
    for block in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
        lines_before = "\n" * text.count("\n", 0, block.start(1))  # errors then name the guide's own line
        exec(compile(lines_before + block[1], str(path), "exec"), names)
    return names


def test_the_serving_guide_runs_in_order():
    run("serving.md")


def test_the_guide_to_other_caches_runs_in_order():
    run("cache-formats.md")


def test_the_training_guide_runs_in_order():
    pytest.importorskip("optax")
    run("training.md")


def test_the_guide_to_splitting_attention_runs_in_order():
    assert run("sharding.md")["devices"] >= 1


def test_the_guide_from_another_library_runs_in_order():
    pytest.importorskip("flax")
    run("from-another-library.md")


def test_the_guide_to_masks_runs_in_order():
    run("masks.md")


def test_the_page_of_troubles_runs():
    assert run("trouble.md")["message"]
