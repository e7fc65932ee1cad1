"""Finds the compiled libraries, registers their custom calls, and says what can run where.

The CPU kernels live in the extension `jax_flash._core`. The CUDA kernels are a plain shared library with no
Python in it, `libjax_flash_cuda.so`: inside this package when built from source, else in the wheel
`jax-flash-cuda12` or `jax-flash-cuda13`, whichever matches the CUDA plugin of the installed jax. Without
either, `implementation="xla"` still runs.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from .checker import DTYPES
from .operands import PASSES

CUDA_LIBRARY = "libjax_flash_cuda.so"
CUDA_MAJORS = (13, 12)
ALL_PASSES = tuple(pass_.name for pass_ in PASSES)


@dataclass(frozen=True)
class Kernel:
    """A row of the kernel table that was built.

    Attributes:
      arch: the devices it is for, such as "sm90".
      pass_: "forward", "backward", "bias_gradient", "tangent" or "decode".
      d, dv: the head dims that its tiles hold.
      dtypes: the input dtypes.
      loaders: where keys and values come from, "dense" rows or "paged" pools.
      design: the algorithm, by its name in csrc/kernels.def.
    """

    arch: str
    pass_: str
    d: int
    dv: int
    dtypes: tuple[str, ...]
    loaders: tuple[str, ...] = ("dense",)
    design: str = "tiles"

    @property
    def latent(self) -> bool:
        """Whether V is the first columns of K."""
        return self.design.startswith("latent")


@dataclass(frozen=True)
class CudaLibrary:
    """The CUDA library, loaded: where it lies, its rows, and its handlers by custom-call name."""

    path: Path
    kernels: tuple[Kernel, ...]
    handlers: dict[str, Any]


@dataclass(frozen=True)
class Backend:
    """One implementation as this process finds it.

    Attributes:
      implementation: the value of `implementation=`: "cpu", "cuda" or "xla".
      library: the file it was loaded from; None where there is none (always for "xla").
      problem: why it is not installed, with the way out; None where it is.
      archs: "cpu": the instruction set chosen on this machine; "cuda": the archs built, such as "sm90".
      passes: the passes built: "forward", "backward", "bias_gradient", "tangent", "append", "append_dynamic"; "cuda":
        "decode" too.
      dtypes: the input dtypes built.
      head_dims: the `(d, dv)` rows built, ascending; empty: any up to 512.
      devices: the local devices it runs on.
    """

    implementation: str
    library: Path | None
    problem: str | None
    archs: tuple[str, ...]
    passes: tuple[str, ...]
    dtypes: tuple[str, ...]
    head_dims: tuple[tuple[int, int], ...]
    devices: tuple[jax.Device, ...]


def backends() -> list[Backend]:
    """What is installed, built and found: one `Backend` each for "cpu", "cuda" and "xla".

    Never raises; `Backend.problem` says what is missing.

    Example:
      >>> [b.implementation for b in jax_flash.backends() if b.problem is None]
      ['cpu', 'xla']
    """
    core, problem = _load_core()
    cpu = Backend(
        implementation="cpu",
        library=Path(str(core.__file__)) if core else None,
        problem=problem,
        archs=(core.cpu_isa(),) if core else (),
        passes=tuple(name.removeprefix("jax_flash_") for name in core.registrations()) if core else (),
        dtypes=DTYPES if core else (),
        head_dims=(),
        devices=local_devices("cpu") if core else (),
    )
    everything = tuple(d for platform in ("cpu", "cuda") for d in local_devices(platform))
    others = tuple(d for d in local_devices(None) if d not in everything)
    xla = Backend("xla", None, None, (), ALL_PASSES, DTYPES, (), everything + others)
    return [cpu, _cuda_backend(), xla]


def _cuda_backend() -> Backend:
    library, problem = _load_cuda()
    rows = library.kernels if library else ()
    return Backend(
        implementation="cuda",
        library=library.path if library else None,
        problem=problem,
        archs=tuple(sorted({row.arch for row in rows})),
        passes=tuple(sorted({row.pass_ for row in rows} | _appends(library))),
        dtypes=tuple(name for name in DTYPES if any(name in row.dtypes for row in rows)),
        head_dims=tuple(sorted({(row.d, row.dv) for row in rows if row.d})),
        devices=tuple(d for d in local_devices("cuda") if rows and why_not_on(d) is None),
    )


def _appends(library: CudaLibrary | None) -> set[str]:
    """The passes of append_kv. In the table their rows have the one pass "append", so the handlers tell them apart."""
    handlers = library.handlers if library else {}
    return {pass_.name for pass_ in PASSES if pass_.in_place and f"jax_flash_{pass_.name}" in handlers}


@cache
def register() -> None:
    """Registers every custom call found, for the platforms `cpu` and `CUDA`; what is missing is left out.

    This runs when jax_flash is imported, because a program that another process exported or compiled calls the handlers
    without running any other code of this library. It starts no backend: JAX keeps the handlers until one starts.
    """
    core, _ = _load_core()
    if core is not None:
        _register(core.registrations(), "cpu")
    library, _ = _load_cuda()
    if library is not None:
        _register(library.handlers, "CUDA")


def _register(handlers: dict[str, Any], platform: str) -> None:
    for name, handler in handlers.items():
        jax.ffi.register_ffi_target(name, handler, platform=platform)


def cuda_library() -> CudaLibrary | None:
    """The CUDA library, or None where it is not installed."""
    return _load_cuda()[0]


def extension() -> tuple[ModuleType | None, str | None]:
    """`jax_flash._core`, or None and why there is none."""
    return _load_core()


def require_cpu(operation: str) -> None:
    """Raises NotImplementedError where the extension with the CPU kernels was not built."""
    _, problem = _load_core()
    if problem is not None:
        raise NotImplementedError(f'{operation}: implementation "cpu" is {problem}; "xla" runs here')


def require_cuda(operation: str) -> None:
    """Raises NotImplementedError if this process has a CUDA device and no CUDA library, so that the call could not run.

    A process without a CUDA device may lower for CUDA, because it may export the program to another machine.
    """
    _, problem = _load_cuda()
    if problem is not None and local_devices("cuda"):
        raise NotImplementedError(f'{operation}: implementation "cuda" is {problem}; "xla" runs here')


def local_devices(platform: str | None) -> tuple[jax.Device, ...]:
    """This process's devices of a platform, None: of the default one; none where jax has no such backend.

    JAX fails with an AssertionError if JAX_PLATFORMS is "cuda" and no plugin for it is installed.
    """
    try:
        return tuple(jax.local_devices(backend=platform))
    except (RuntimeError, AssertionError):
        return ()


def why_not_on(device: jax.Device) -> str | None:
    """Why none of the kernels that were built runs on a CUDA device; None where one does."""
    library, problem = _load_cuda()
    if library is None:
        return problem
    archs = sorted({row.arch for row in library.kernels})
    capability = compute_capability(device)
    core, _ = _load_core()
    if core is not None and any(core.covers(arch, capability) for arch in archs):
        return None
    return f"built for {', '.join(archs)}, and the device is sm_{capability}"


def compute_capability(device: jax.Device) -> int:
    """The compute capability as a number: 90 for "9.0"."""
    return int(str(getattr(device, "compute_capability", "0.0")).replace(".", ""))


@cache
def _load_core() -> tuple[ModuleType | None, str | None]:
    """The extension, or why there is none."""
    try:
        core = importlib.import_module("._core", __package__)
        core.cpu_isa()  # raises ValueError if JAX_FLASH_CPU_ISA names an instruction set that this machine lacks
    except ModuleNotFoundError:
        return None, (
            "not built: this is a source tree, which hides an installed jax_flash from Python started in it; "
            "`pip install -e .` builds it here"
        )
    except (ImportError, ValueError) as error:
        return None, f"not usable: {error}"
    return core, None


@cache
def _load_cuda() -> tuple[CudaLibrary | None, str | None]:
    """The CUDA library, or why there is none."""
    core, problem = _load_core()
    if core is None:
        return None, problem
    path, problem = _find_cuda(Path(str(core.__file__)).parent, core.version())
    if path is None:
        return None, problem
    try:
        handlers = core.load_cuda(str(path))
    except RuntimeError as error:
        return None, f"not loadable: {error}"
    return CudaLibrary(path, tuple(Kernel(*row) for row in core.cuda_kernels()), handlers), None


def _find_cuda(package: Path, version: str) -> tuple[Path | None, str | None]:
    """The library's path: inside the package, else in the wheel of the installed jax plugin's CUDA major."""
    if (package / CUDA_LIBRARY).exists():
        return package / CUDA_LIBRARY, None
    major = cuda_major()
    wheel = f"jax-flash-cuda{major}"
    spec = importlib.util.find_spec(wheel.replace("-", "_"))
    if spec is None or spec.origin is None:
        source = "in a clone of the repository JAX_FLASH_CUDA=ON pip install . where nvcc is"
        built = f'pip install "jax-flash[cuda{major}]" where an index or --find-links has its wheel'
        return None, f"not installed: {source}, or {built}"
    try:
        found = importlib.metadata.version(wheel)
    except importlib.metadata.PackageNotFoundError:
        found = version  # the package was copied there without pip; the library itself tells its version, too
    if found != version:
        problem = f"of another version: {wheel} is {found}, jax-flash is {version}"
        return None, f"{problem}; pip install {wheel}=={version}"
    return Path(spec.origin).parent / CUDA_LIBRARY, None


def cuda_major() -> int:
    """The CUDA major of the installed jax plugin; the newest where there is none."""
    for major in CUDA_MAJORS:
        if importlib.util.find_spec(f"jax_cuda{major}_plugin") is not None:
            return major
    return CUDA_MAJORS[0]
