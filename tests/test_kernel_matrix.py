"""docs/matrix.md says which kernel runs a call; its tables are made from the plan."""

from tools import kernel_matrix


def test_the_tables_of_the_matrix_are_those_of_the_plan():
    text = kernel_matrix.PAGE.read_text()
    assert kernel_matrix.render(text) == text, "stale: run `python tools/kernel_matrix.py`"
