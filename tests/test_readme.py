"""The README's examples run, one after another, as a reader would try them."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
LINK = re.compile(r"\]\(([^)#:]+)\)")


def test_the_examples_run_in_order():
    pytest.importorskip("flax")
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL):
        exec(compile(block, str(README), "exec"), names)
    assert names["out"].shape == (1, 1024, 8, 64)


@pytest.mark.parametrize(
    "page", [README, *sorted((README.parent / "docs").rglob("*.md"))], ids=lambda p: p.name
)
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        assert (page.parent / link).exists(), link
