"""Shared by the files of all libraries: counts tests, compares calls, and prints the result as a line of JSON."""

from __future__ import annotations

import fnmatch
import importlib.util
import inspect
import json
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

_RANDOM = jax.random.key(21)
_TESTS = Path(__file__).resolve().parents[2] / "tests"


def source() -> Path:
    """The folder of the library's source distribution, if its pin says that its tests are there."""
    return Path(os.environ["LIBRARY_SOURCE"])


class Comparison:
    """Calls of an adapter and of the library's own attention: results and gradients, also inside jit.

    Args:
      tolerance: allowed |ours − theirs| is `tolerance · (1 + |theirs|)`; for 16-bit arrays 2e-2 is used instead.
      zero_rows: rows that are 0 here, because no key is visible, are not compared; some libraries average the values.
    """

    def __init__(self, tolerance: float = 2e-5, zero_rows: bool = True):
        self.tolerance, self.zero_rows = tolerance, zero_rows
        self.made = self.close = 0
        self.worst = 0.0

    def beside(self, ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
        """`ours`, whose result and gradients for its first three arguments are compared with those of `theirs`."""

        def call(query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> Any:
            out = ours(query, key, value, *rest, **named)
            arrays = [jax.lax.stop_gradient(jnp.asarray(x)) for x in (query, key, value)]
            both = [
                jax.vjp(lambda *x, f=f: jax.tree.leaves(f(*x, *rest, **named)), *arrays)
                for f in (ours, theirs)
            ]
            leaves = both[0][0]
            cotangents = [jax.random.normal(_RANDOM, x.shape).astype(x.dtype) for x in leaves]
            if self.zero_rows:
                cotangents[0] = jnp.where((leaves[0] == 0).all(-1, keepdims=True), 0, cotangents[0])
            results = []
            for outs, pullback in both:
                results.append([*outs, *pullback([c.astype(x.dtype) for c, x in zip(cotangents, outs)])])
            largest = [jnp.abs(x).max(initial=0).astype(jnp.float32) for x in arrays]
            jax.debug.callback(self.record, jnp.maximum(*largest[:2]) * largest[2], *results)
            return out

        return call

    def record(self, size: Any, ours: Sequence[Any], theirs: Sequence[Any], grads: int = 3) -> None:
        """Counts a call, whose last `grads` arrays are gradients. `size`, max|q or k| · max|v|, bounds the terms that
        cancel in gradients near 0."""
        self.made += 1
        outs = len(ours) - grads
        worst = 0.0
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            low = max(np.finfo(x.dtype).eps if x.dtype.kind == "f" else 1e-2 for x in (a, b)) > 1e-5
            a, b = (np.asarray(x, np.float64) for x in (a, b))
            rounding = (8e-3 if low else 4e-6) * float(size) if index >= outs else 0.0
            off = np.abs(a - b) / ((1 + np.abs(b)) * (2e-2 if low else self.tolerance) + rounding)
            if self.zero_rows and index == 0:
                off = np.where((a == 0).all(-1, keepdims=True), 0, off)
            worst = max(worst, float(off.max(initial=0)))
        self.close += bool(worst <= 1)  # NaN is not close
        self.worst = max(self.worst, worst)


class _Counter:
    """A plugin of pytest that remembers the outcome of each test."""

    def __init__(self) -> None:
        self.outcome: dict[str, str] = {}
        self.error: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        before = self.outcome.get(report.nodeid, "passed")
        if report.outcome != "passed" or report.when == "call":
            self.outcome[report.nodeid] = before if before == "failed" else report.outcome
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            self.error[report.nodeid] = (crash.message if crash else str(report.longrepr)).splitlines()[0]

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.outcome[report.nodeid] = "failed"
            self.error[report.nodeid] = str(report.longrepr).splitlines()[-1]


class _Fixtures:
    """Those of tests/conftest.py that tests of an adapter beside its library need; its settings are for the suite."""

    @pytest.fixture
    def exact_products(self) -> Iterator[None]:
        with jax.default_matmul_precision("highest"):
            yield


class Library:
    """One library's row: what ran, what passed, and why the rest did not.

    Args:
      name: its row's name, that of its file.
      package: the distribution whose version is printed; none where a clone's source is run.
      expected: reasons of tests that cannot pass, by patterns of their names.
    """

    def __init__(self, name: str, package: str, expected: dict[str, str] | None = None):
        self.name, self.package, self.expected = name, package, expected or {}
        self.passed = self.total = 0
        self.ours_passed = self.ours = 0
        self.reasons: dict[str, int] = {}
        self.surprises: list[str] = []

    def pytest(self, *paths: Path | str, options: Iterable[str] = (), ours: bool = False) -> None:
        """Runs test files in this process, where the library is already patched; `ours` are files of this tree."""
        counter = _Counter()
        plugins = [counter, _Fixtures()] if ours else [counter]
        arguments = ["-q", "--tb=short", "-p", "no:cacheprovider", *options]
        # Their files' own ini files ask for plugins that are not installed.
        pytest.main([*arguments, "-c", os.devnull, *map(str, paths)], plugins=plugins)
        for name, outcome in counter.outcome.items():
            if outcome != "skipped":
                self.count(name, outcome == "passed", counter.error.get(name, ""), ours)

    def our_tests(self, *tests: str) -> None:
        """Runs those tests of this tree that compare an adapter with the library itself."""
        self.pytest(*(_TESTS / test for test in tests), options=["--noconftest"], ours=True)

    def case(self, name: str, run: Callable[[], Any]) -> None:
        """Counts a call that is written here and passes if it returns, for libraries that publish no tests."""
        passed, message = True, ""
        try:
            run()
        except Exception as error:
            passed, message = False, f"{type(error).__name__}: {error}".splitlines()[0]
        self.count(name, passed, message, ours=True)

    def count(self, name: str, passed: bool, error: str, ours: bool) -> None:
        if ours:
            self.ours += 1
            self.ours_passed += passed
        else:
            self.total += 1
            self.passed += passed
        if passed:
            return
        reason = next((why for pattern, why in self.expected.items() if fnmatch.fnmatch(name, pattern)), None)
        if reason is None:
            self.surprises.append(f"{name}: {error}")
        else:
            self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def report(self, *comparisons: Comparison) -> int:
        """Prints the line of JSON that the runner reads; the exit status is 1 where a failure has no known reason."""
        made, close = (sum(getattr(x, field) for x in comparisons) for field in ("made", "close"))
        if made != close:
            worst = max(x.worst for x in comparisons)
            self.surprises.append(f"{made - close} calls differ, by up to {worst:.1f} tolerances")
        for line in self.surprises:
            print("not expected:", line, file=sys.stderr)
        why = [f"{n}: {reason}" for reason, n in self.reasons.items()]
        why += [f"not expected: {line}"[:160] for line in self.surprises[:3]]
        row = dict(
            library=self.name,
            version=version(self.package) if self.package else "source",
            passed=self.passed,
            total=self.total,
            ours_passed=self.ours_passed,
            ours=self.ours,
            calls=made,
            calls_close=close,
            why_not="; ".join(why),
        )
        print(json.dumps(row))
        return int(bool(self.surprises) or not self.total + self.ours)


def bare(name: str) -> None:
    """Makes a package importable without what its own __init__ imports."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    parent, _, last = name.rpartition(".")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    if parent:
        setattr(sys.modules[parent], last, sys.modules[name])


_REPLACED: dict[str, Callable[..., Any]] = {}


def replace(theirs: types.FunctionType, ours: Callable[..., Any]) -> Callable[..., Any]:
    """Makes every reference to a function of the library, in defaults and imports too, call `ours` instead.

    Returns the function as it was.
    """
    kept = types.FunctionType(
        theirs.__code__, theirs.__globals__, theirs.__name__, theirs.__defaults__, theirs.__closure__
    )
    kept.__kwdefaults__ = theirs.__kwdefaults__
    signature = inspect.signature(theirs)

    def call(*arguments: Any, _replaced: str, **named: Any) -> Any:
        from tools.libraries import common  # the code runs with the globals of the library's module

        return common._REPLACED[_replaced](*arguments, **named)

    name = f"{theirs.__module__}.{theirs.__qualname__}"
    _REPLACED[name] = ours
    theirs.__code__ = call.__code__
    theirs.__defaults__, theirs.__kwdefaults__ = None, {"_replaced": name}
    theirs.__signature__ = signature  # type: ignore[attr-defined]
    return kept
