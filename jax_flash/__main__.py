"""Says what is installed, built and found, and which implementation runs on each device, or why none does."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys

from . import plan_command
from ._version import __version__
from .backends import ALL_PASSES, Backend, backends, cuda_major, why_not_on
from .checker import DTYPES
from .operands import MAX_HEAD_DIM, MAX_LATENT_DIM


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jax_flash", description=__doc__)
    parser.add_argument(
        "--require-built",
        metavar="NAME",
        choices=("cpu", "cuda"),
        help="exit with 1 unless this implementation is built and loads",
    )
    parser.add_argument("--version", action="version", version=f"jax_flash {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="plan")
    summary = "tells which CUDA kernel a call of given sizes runs, its tiles and its workspace; needs no GPU"
    plan = commands.add_parser(
        "plan",
        description=plan_command.__doc__,
        help=summary,
        epilog=plan_command.LEGEND,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan_command.add_arguments(plan)
    options = parser.parse_args(arguments)
    if options.command == "plan":
        return plan_command.run(options)
    required = options.require_built
    found = backends()
    print("\n".join(report(found)))
    return int(any(b.implementation == required and b.problem is not None for b in found))


def report(found: list[Backend]) -> list[str]:
    """The lines that `python -m jax_flash` prints."""
    versions = [f"jax_flash {__version__}", f"Python {platform.python_version()}"]
    versions += [f"{name} {version}" for name in _packages() if (version := _version(name))]
    lines = [", ".join(versions), ""]
    for backend in found:
        lines += [*_describe(backend), ""]
    return lines + _devices(found)


def _packages() -> tuple[str, ...]:
    return "jax", "jaxlib", f"jax-cuda{cuda_major()}-plugin"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _describe(backend: Backend) -> list[str]:
    name = f"{backend.implementation:5}"
    if backend.problem is not None:
        return [f"{name} {backend.problem}"]
    if backend.implementation == "xla":
        return [f"{name} plain JAX: every option on every platform, memory quadratic in the length"]
    any_dims = f"any, up to {MAX_HEAD_DIM}; of latent pools up to {MAX_LATENT_DIM}/{MAX_HEAD_DIM}"
    dims = ", ".join(f"{d}" if d == dv else f"{d}/{dv}" for d, dv in backend.head_dims)
    return [
        f"{name} {backend.library}",
        f"      built for  {', '.join(backend.archs)}",
        f"      passes     {', '.join(backend.passes)}",
        f"      dtypes     {', '.join(backend.dtypes)}",
        f"      head dims  {dims or any_dims}",
    ]


def _devices(found: list[Backend]) -> list[str]:
    """One line per device: the implementation that `implementation=None` chooses there, or why there is none."""
    by_name = {backend.implementation: backend for backend in found}
    lines = []
    for device in by_name["xla"].devices:
        own = "cuda" if device.platform == "gpu" else device.platform
        backend = by_name.get(own)
        if backend is None:
            verdict = 'no kernels for this platform: name implementation="xla"'
        elif device in backend.devices:
            verdict = f'runs "{own}", and "xla" where named' + _gaps(backend)
        else:
            problem = backend.problem or why_not_on(device)
            verdict = f'"{own}" is {problem}; implementation="xla" runs'
        lines.append(f"{device} ({device.device_kind}): {verdict}")
    return lines or ["no device: jax could not start a backend"]


def _gaps(backend: Backend) -> str:
    """What the built kernels lack, so that nobody learns it only from an error."""
    lacking = [name for name in ALL_PASSES if name not in backend.passes]
    lacking += [name for name in DTYPES if name not in backend.dtypes]
    return f"; not yet: {', '.join(lacking)}" if lacking else ""


if __name__ == "__main__":
    sys.exit(main())
