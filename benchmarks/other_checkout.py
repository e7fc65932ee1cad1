"""Imports jax_flash from another checkout beside this one's, so that both can be timed in one process.

JAX and XLA keep what a package registers under names that hold for the whole process: custom-call targets. The
other package's code says `jax.ffi.register_ffi_target(name, …)` and `jax.ffi.ffi_lowering(name, …)`, and its
modules are given a stand-in for `jax` whose two functions put a prefix before those names. Nothing in the other
checkout is changed. All else that the two share (primitives, lowering rules) JAX keeps by object, not by name.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

NAME = "jax_flash_before"
PREFIX = "before_"


class WithPrefixedTargets:
    """`jax.ffi`, with a prefix before the name of every custom-call target."""

    def __getattr__(self, name: str) -> Any:
        return getattr(jax.ffi, name)

    def register_ffi_target(self, name: str, *arguments: Any, **options: Any) -> Any:
        return jax.ffi.register_ffi_target(PREFIX + name, *arguments, **options)

    def ffi_lowering(self, name: str, *arguments: Any, **options: Any) -> Any:
        return jax.ffi.ffi_lowering(PREFIX + name, *arguments, **options)


class JaxWithPrefixedTargets:
    """`jax`, but for `jax.ffi`."""

    ffi = WithPrefixedTargets()

    def __getattr__(self, name: str) -> Any:
        return getattr(jax, name)


def load(checkout: Path) -> ModuleType:
    """The package jax_flash of `checkout`, imported as jax_flash_before, with its own compiled libraries."""
    package = checkout / "jax_flash"
    if not list(package.glob("_core*.so")):
        raise FileNotFoundError(f"{package} has no _core*.so: build it there with tools/build_inplace.sh")
    spec = importlib.util.spec_from_file_location(
        NAME, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"{package}/__init__.py cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    replacement = JaxWithPrefixedTargets()
    for name, part in list(sys.modules.items()):
        if name.partition(".")[0] == NAME and part.__dict__.get("jax") is jax:
            part.__dict__["jax"] = replacement
    return module
