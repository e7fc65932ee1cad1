"""The CUDA library alone, built by cmake or on the emulator, and its forward called through jax.ffi."""

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
TARGET = "jax_flash_check_forward"


def build(archs: str) -> Path:
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
    spills = [line.strip() for line in log.read_text().splitlines() if " spill stores" in line]
    spilling = [line for line in spills if " 0 bytes spill stores" not in line]
    print(f"built in {time.time() - began:.0f} s; {len(spilling)} of {len(spills)} kernels spill: {spilling}")
    return folder / "libjax_flash_cuda.so"


def build_emulated() -> Path:
    folder = ROOT / "build" / "emulated"
    subprocess.run(
        ["cmake", "-S", ROOT / "tools" / "emulator", "-B", folder, f"-DPython_EXECUTABLE={sys.executable}"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    subprocess.run(["cmake", "--build", folder, "--parallel", "2"], check=True, stdout=subprocess.DEVNULL)
    return folder / "libjax_flash_cuda.so"


def register(path: Path, platform: str) -> None:
    import jax

    library = ctypes.CDLL(str(path))
    library.jax_flash_version.restype = ctypes.c_char_p
    handler = jax.ffi.pycapsule(library.JaxFlashForwardCuda)
    jax.ffi.register_ffi_target(TARGET, handler, platform=platform)
    print(f"jax {jax.__version__}, {path} {library.jax_flash_version().decode()}, {jax.devices()[0]}")


def forward(spec: Any, operands: dict[str, Any], leading: tuple[int, ...] = ()) -> tuple[Any, Any]:
    """The custom call, into memory that held NaN before where the allocator plays along."""
    import jax.numpy as jnp

    for like in results_like(operands, leading):
        jnp.full(like.shape, jnp.nan, like.dtype).block_until_ready().delete()
    return forward_into(spec, operands, leading)


def forward_into(spec: Any, operands: dict[str, Any], leading: tuple[int, ...] = ()) -> tuple[Any, Any]:
    """The custom call: out and lse."""
    import jax
    import jax.numpy as jnp

    from jax_flash.workspace import workspace_bound

    # Through jit a dictionary comes back in alphabetical order.
    ordered = [operands[name] for name in ("query", "key", "value", *spec.operands)]
    bound = workspace_bound("forward", spec, {name: x.shape for name, x in operands.items()})
    results = (*results_like(operands, leading), jax.ShapeDtypeStruct((bound,), jnp.uint8))
    return jax.ffi.ffi_call(TARGET, results)(*ordered, spec=spec.ffi_attributes())[:2]


def results_like(operands: dict[str, Any], leading: tuple[int, ...]) -> tuple[Any, Any]:
    """Shapes and dtypes of out and lse."""
    import jax
    import jax.numpy as jnp

    query, value = operands["query"], operands["value"]
    rows, heads = query.shape[len(leading) : -2], query.shape[-2]
    out = jax.ShapeDtypeStruct((*leading, *rows, heads, value.shape[-1]), query.dtype)
    return out, jax.ShapeDtypeStruct((*leading, *rows[:-1], heads, rows[-1]), jnp.float32)
