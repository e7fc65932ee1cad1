"""How the modules of jax_flash import each other, those within functions included."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import jax
import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "jax_flash"


def imports(package: Path) -> dict[str, set[str]]:
    """The modules of the package that each of them imports, by their dotted names within it."""
    names = {
        path: ".".join(path.relative_to(package).with_suffix("").parts) for path in package.rglob("*.py")
    }
    return {name: set(_imported(path, name, set(names.values()))) for path, name in names.items()}


def _imported(path: Path, name: str, modules: set[str]):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            target = ast.unparse(node.args[0]).strip("'\"")
            assert not target.startswith(".") or target == "._core", f"{name}: a hidden import of {target}"
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        package = name.split(".")[: -node.level] + (node.module.split(".") if node.module else [])
        for alias in node.names:
            for target in (
                ".".join([*package, alias.name]),
                ".".join(package),
                ".".join([*package, "__init__"]),
            ):
                if target in modules:
                    yield target
                    break


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """Some modules that import each other in a circle; empty where there are none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        found = next((c for other in sorted(edges[name]) if (c := visit(other, [*path, name]))), [])
        done.add(name)
        return found

    return next((c for name in sorted(edges) if (c := visit(name, []))), [])


def test_a_jax_without_a_private_name_is_told_by_its_version(monkeypatch):
    monkeypatch.delattr("jax._src.core.definitely_equal")
    spec = importlib.util.spec_from_file_location("jax_flash._private_again", PACKAGE / "_private.py")
    message = rf"^jax_flash .* does not know jax {re.escape(jax.__version__)}: cannot import name 'definitely_equal'"
    with pytest.raises(ImportError, match=message):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_private_names_of_jax_are_imported_in_one_module():
    using = {path.name for path in PACKAGE.rglob("*.py") if "jax._src" in path.read_text()}
    assert using == {"_private.py"}


def test_no_modules_import_each_other_in_a_circle():
    assert cycle(imports(PACKAGE)) == []


def test_a_circle_through_a_function_is_found(tmp_path):
    (tmp_path / "a.py").write_text("from . import b\n")
    (tmp_path / "b.py").write_text("def f():\n    from .c import x\n")
    (tmp_path / "c.py").write_text("from .a import x\n")
    (tmp_path / "d.py").write_text("from .a import x\n")
    assert cycle(imports(tmp_path)) == ["a", "b", "c"]
