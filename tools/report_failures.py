"""A pytest plugin that writes each failure at once, so that a run keeps its tracebacks if a time limit ends it.

JAX_FLASH_FAILURES=out/failures.txt PYTHONPATH=tools python -m pytest -p report_failures tests
"""

import os

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        with open(os.environ["JAX_FLASH_FAILURES"], "a") as file:
            file.write(f"== {report.nodeid} ({report.when})\n{report.longreprtext}\n\n")
