"""`export_checks`: what `jax.export` must be told to put this library's custom calls into an exported program."""

from __future__ import annotations

from jax.export import DisabledSafetyCheck

from .operands import DELTA, PASSES


def export_checks() -> list[DisabledSafetyCheck]:
    """The `disabled_checks` with which `jax.export.export` takes a program that calls this library.

    `jax.export` refuses custom calls that are not listed, since it cannot know whether a later version still has them.
    These stay as they are within a version of jax_flash: read a program with the version that exported it. Serialising
    it (`exported.serialize()`) needs the package flatbuffers.

    Returns:
      One check for each custom call, in a new list.

    Example:
      >>> exported = jax.export.export(jax.jit(step), disabled_checks=export_checks())(*arguments)
    """
    return [DisabledSafetyCheck.custom_call(f"jax_flash_{pass_.name}") for pass_ in (*PASSES, DELTA)]
