"""The CUDA library alone, built by cmake or on the emulator, and its passes called through jax.ffi."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HANDLERS = {
    "forward": "JaxFlashForwardCuda",
    "backward": "JaxFlashBackwardCuda",
    "bias_gradient": "JaxFlashBiasGradientCuda",
}


def build(archs: str) -> Path:
    """The library for these JAX_FLASH_CUDA_ARCHS; prints how long it took and what spills."""
    folder = ROOT / "build" / "gpu-check"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    settings = {"Python_EXECUTABLE": sys.executable, "JAX_FLASH_MODULE": "OFF", "JAX_FLASH_CUDA": "ON"}
    settings |= {"JAX_FLASH_CUDA_ARCHS": archs, "CMAKE_CUDA_FLAGS": "-Xptxas=-v"}
    defines = [f"-D{name}={value}" for name, value in settings.items()]
    began = time.time()
    subprocess.run(["cmake", "-S", ROOT, "-B", folder, *generator, *defines], check=True)
    log = folder / "build.log"
    with log.open("w") as out:
        status = subprocess.run(
            ["cmake", "--build", folder, "--parallel", str(os.cpu_count())], stdout=out, stderr=out
        )
    if status.returncode:
        print(log.read_text()[-8000:])
        raise SystemExit(status.returncode)
    print(f"built in {time.time() - began:.0f} s")
    return folder / "libjax_flash_cuda.so"


def build_emulated(head_dims: str) -> Path:
    """The library on the emulator, with the rows of these JAX_FLASH_HEAD_DIMS (empty: all)."""
    folder = ROOT / "build" / "emulated"
    defines = [f"-DPython_EXECUTABLE={sys.executable}", f"-DJAX_FLASH_HEAD_DIMS={head_dims}"]
    source = ROOT / "tools" / "emulator"
    subprocess.run(["cmake", "-S", source, "-B", folder, *defines], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", folder, "--parallel", "2"], check=True, stdout=subprocess.DEVNULL)
    return folder / "libjax_flash_cuda.so"


def register(path: Path, platform: str) -> None:
    import jax

    library = ctypes.CDLL(str(path))
    library.jax_flash_version.restype = ctypes.c_char_p
    for pass_, symbol in HANDLERS.items():
        handler = jax.ffi.pycapsule(getattr(library, symbol))
        jax.ffi.register_ffi_target(_target(pass_), handler, platform=platform)
    print(f"jax {jax.__version__}, {path} {library.jax_flash_version().decode()}, {jax.devices()[0]}")


def _target(pass_: str) -> str:
    return f"jax_flash_check_{pass_}"


def call(pass_: str, spec: Any, operands: dict[str, Any]) -> list[Any]:
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
    return jax.ffi.ffi_call(_target(pass_), results)(*ordered, spec=spec.ffi_attributes())[:-1]


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
