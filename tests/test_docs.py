"""The code blocks of docs/serving.md run, one after another, as a reader would try them."""

import re
from pathlib import Path

import jax
import pytest

SERVING = Path(__file__).parent.parent / "docs" / "serving.md"


def test_the_serving_guide_runs_in_order():
    pytest.importorskip("flax")
    if jax.device_count() < 2:
        pytest.skip("the guide shards heads over two devices")
    text = SERVING.read_text()
    names: dict[str, object] = {"__name__": "serving"}
    for block in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
        lines_before = "\n" * text.count("\n", 0, block.start(1))  # errors then name the guide's own line
        exec(compile(lines_before + block[1], str(SERVING), "exec"), names)
    assert names["message"]
