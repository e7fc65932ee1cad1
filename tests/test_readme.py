"""The README's examples run, one after another, as a reader would try them."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
ROOT = README.parent
LINK = re.compile(r"\]\(([^)#:]+)(?:#([^)]*))?\)")
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_examples_run_in_order():
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL):
        exec(compile(block, str(README), "exec"), names)
    assert names["step"].shape == (2, 1, 8, 64)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for link, heading in LINK.findall(page.read_text()):
        assert (page.parent / link).exists(), link
        assert not heading or heading in headings(page.parent / link), f"{link}#{heading}"


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    lines = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}
