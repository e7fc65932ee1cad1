"""Imports jax_flash from another checkout as a second package, so that both can be timed in one process.

JAX and XLA register custom-call targets under names that hold for the whole process. The other package calls
`jax.ffi.register_ffi_target(name, …)` and `jax.ffi.ffi_lowering(name, …)`, so its modules get a replacement of `jax`
whose `ffi` puts a prefix before those names. Importing them registers the libraries, and meanwhile
`jax.ffi.register_ffi_target` itself adds the prefix. Nothing in the other checkout is changed. JAX keeps primitives
and lowering rules by object, not by name, so both packages may have equal names there.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import jax


class FfiWithPrefix:
    """`jax.ffi`, with a prefix before the name of every custom-call target."""

    def __init__(self, prefix: str):
        self._prefix = prefix
        self._register = jax.ffi.register_ffi_target

    def __getattr__(self, name: str) -> Any:
        return getattr(jax.ffi, name)

    def register_ffi_target(self, name: str, *arguments: Any, **options: Any) -> Any:
        return self._register(self._prefix + name, *arguments, **options)

    def ffi_lowering(self, name: str, *arguments: Any, **options: Any) -> Any:
        return jax.ffi.ffi_lowering(self._prefix + name, *arguments, **options)

    def ffi_call(self, name: str, *arguments: Any, **options: Any) -> Any:
        return jax.ffi.ffi_call(self._prefix + name, *arguments, **options)


class JaxWithPrefix:
    """`jax`, except for `jax.ffi`."""

    def __init__(self, prefix: str):
        self.ffi = FfiWithPrefix(prefix)

    def __getattr__(self, name: str) -> Any:
        return getattr(jax, name)


def load(checkout: Path, name: str = "jax_flash_before") -> ModuleType:
    """The package jax_flash of `checkout`, imported under another name, with its own compiled libraries."""
    package = checkout / "jax_flash"
    if not list(package.glob("_core*.so")):
        raise FileNotFoundError(f"{package} has no _core*.so: build it there with tools/build_inplace.sh")
    spec = importlib.util.spec_from_file_location(
        name, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"{package}/__init__.py cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    replacement = JaxWithPrefix(f"{name}_")
    with mock.patch.object(jax.ffi, "register_ffi_target", replacement.ffi.register_ffi_target):
        spec.loader.exec_module(module)
    for part_name, part in list(sys.modules.items()):
        if part_name.partition(".")[0] == name and part.__dict__.get("jax") is jax:
            part.__dict__["jax"] = replacement
    return module
