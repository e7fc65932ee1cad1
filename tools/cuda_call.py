"""The CUDA library alone, built by cmake or on the emulator, and its passes called through jax.ffi."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HANDLERS = {
    "forward": "JaxFlashForwardCuda",
    "backward": "JaxFlashBackwardCuda",
    "bias_gradient": "JaxFlashBiasGradientCuda",
    "append": "JaxFlashAppendCuda",
}
EMULATED = ROOT / "build" / "emulated" / "libjax_flash_cuda.so"


class BuildError(Exception):
    """What the compiler said."""


def build(
    archs: str, folder: Path, defines: dict[str, Any] | None = None, parallel: int | None = None
) -> Path:
    """The library for these JAX_FLASH_CUDA_ARCHS, in a build folder that keeps its build.log."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    settings = {"Python_EXECUTABLE": sys.executable, "JAX_FLASH_MODULE": "OFF", "JAX_FLASH_CUDA": "ON"}
    settings |= {"JAX_FLASH_CUDA_ARCHS": archs, "JAX_FLASH_BUDGET": "OFF", **(defines or {})}
    configure = ["cmake", "-S", ROOT, "-B", folder, *generator, *(f"-D{k}={v}" for k, v in settings.items())]
    compile_ = ["cmake", "--build", folder, "--parallel", str(parallel or os.cpu_count())]
    log = folder / "build.log"
    with log.open("w") as out:
        for command in (configure, compile_):
            if subprocess.run(command, stdout=out, stderr=out).returncode:
                errors = [line for line in log.read_text().splitlines() if "error" in line.lower()]
                raise BuildError("\n".join(errors) or log.read_text()[-4000:])
    return folder / "libjax_flash_cuda.so"


def spills(library: Path) -> dict[str, int]:
    """The bytes that each kernel of a library just built spills, by its name and arch."""
    rows = [x.split("\t") for x in (library.parent / "cuda_resources.tsv").read_text().splitlines()]
    columns = {name: i for i, name in enumerate(rows[0])}
    return {f"{x[columns['kernel']]} {x[columns['arch']]}": int(x[columns["spills"]]) for x in rows[1:]}


def build_emulated(head_dims: str, archs: str = "90a-real") -> Path:
    """The library on the emulator, with the rows of these JAX_FLASH_HEAD_DIMS (empty: all) for these archs."""
    folder = EMULATED.parent
    defines = [f"-DPython_EXECUTABLE={sys.executable}", f"-DJAX_FLASH_HEAD_DIMS={head_dims}"]
    defines += [f"-DJAX_FLASH_CUDA_ARCHS={archs}"]
    source = ROOT / "tests" / "kernels" / "emulator"
    subprocess.run(["cmake", "-S", source, "-B", folder, *defines], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", folder, "--parallel", "2"], check=True, stdout=subprocess.DEVNULL)
    return EMULATED


def open_library(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.jax_flash_version.restype = ctypes.c_char_p
    return library


def register(path: Path, platform: str, name: str = "") -> None:
    """Makes the library's passes callable; `name` tells several libraries apart."""
    import jax

    library = open_library(path)
    for pass_, symbol in HANDLERS.items():
        handler = jax.ffi.pycapsule(getattr(library, symbol))
        jax.ffi.register_ffi_target(_target(pass_, name), handler, platform=platform)
    print(f"jax {jax.__version__}, {path} {library.jax_flash_version().decode()}, {jax.devices()[0]}")


def _target(pass_: str, name: str) -> str:
    return f"jax_flash_check_{pass_} {name}"


def call(pass_: str, spec: Any, operands: dict[str, Any], name: str = "") -> list[Any]:
    """The results of the custom call of a pass."""
    import jax
    import jax.numpy as jnp

    from jax_flash.operands import PASSES, like
    from jax_flash.primitives import operand_names, result_shapes
    from jax_flash.workspace import workspace_bound

    found = next(x for x in PASSES if x.name == pass_)
    shapes = {name: x.shape for name, x in operands.items()}
    results = [
        jax.ShapeDtypeStruct(shape, jnp.float32 if name == "lse" else operands[like(name)].dtype)
        for name, shape in zip(found.results, result_shapes(found, spec, shapes), strict=True)
    ]
    results.append(jax.ShapeDtypeStruct((workspace_bound(pass_, spec, shapes),), jnp.uint8))
    # Through jit a dictionary comes back in alphabetical order.
    ordered = [operands[name] for name in operand_names(found, spec)]
    return jax.ffi.ffi_call(_target(pass_, name), results)(*ordered, spec=spec.ffi_attributes())[:-1]


def into_nan(pass_: str, spec: Any, operands: dict[str, Any]) -> list[Any]:
    """As `call`, into memory that held NaN before where the allocator plays along."""
    import jax
    import jax.numpy as jnp

    for shape in jax.eval_shape(lambda x: call(pass_, spec, x), operands):
        jnp.full(shape.shape, jnp.nan, shape.dtype).block_until_ready().delete()
    return call(pass_, spec, operands)


def differentiate(
    spec: Any, operands: dict[str, Any], dout: Any, dlse: Any
) -> tuple[Any, Any, dict[str, Any]]:
    """Out, lse, and the gradients of query, key, value and the bias for the cotangents dout and dlse."""
    import jax.numpy as jnp

    out, lse = into_nan("forward", spec, operands)
    rows = jnp.swapaxes((dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1), -1, -2)
    operands = operands | {"dout": dout, "lse": lse, "delta": rows - dlse}
    gradients = dict(zip(("query", "key", "value"), into_nan("backward", spec, operands), strict=True))
    if "bias" in operands:
        (gradients["bias"],) = into_nan("bias_gradient", spec, operands)
    return out, lse, gradients
