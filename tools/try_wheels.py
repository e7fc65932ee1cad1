"""Installs the wheels of a folder as a user does, without a GPU: `python tools/try_wheels.py [dist] [--partial]`.

In a new virtual environment of the Python that runs this: jax-flash is installed from the folder, its dependencies
from the package index, and a call and its gradient agree with plain JAX. Then, for each CUDA major, pip resolves
"jax-flash[cudaN]" against the folder without installing jax's gigabytes, and the library of its wheel is installed,
loaded and lists its kernels. --partial skips CUDA wheels that do not exist.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from release import RELEASE, WHEELS, run, version

CALL = """
import jax, jax.numpy as jnp, jax_flash
q = jax.random.normal(jax.random.key(0), (2, 300, 8, 64))
k = v = q[:, :, :2]
def loss(implementation):
    return lambda q: jax_flash.flash_attention(q, k, v, causal=True, implementation=implementation).sum()
ours, plain = (jax.jit(jax.grad(loss(name)))(q) for name in ("cpu", "xla"))
assert jnp.allclose(ours, plain, atol=1e-4), abs(ours - plain).max()
print("jax_flash", jax_flash.__version__, "on jax", jax.__version__, "agrees with plain JAX")
"""
LOAD = """
import importlib.util, pathlib
from jax_flash import _core
folder = pathlib.Path(importlib.util.find_spec("jax_flash_cuda{major}").origin).parent
handlers = _core.load_cuda(str(folder / "libjax_flash_cuda.so"))
kernels = _core.cuda_kernels()
archs = sorted({{kernel[0] for kernel in kernels}})
print("jax-flash-cuda{major}:", len(handlers), "custom calls,", len(kernels), "kernels for", *archs)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dist", type=Path, nargs="?", default=Path("dist"))
    parser.add_argument("--partial", action="store_true")
    options = parser.parse_args()
    dist = options.dist.resolve()
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        install = [Path(folder) / "bin" / "python", "-m", "pip", "install", "-q", "--find-links", dist]
        python = install[0]
        run(*install, f"jax-flash=={version()}", cwd=folder)
        run_program(python, "call.py", CALL, folder)
        run(python, "-m", "jax_flash", cwd=folder)
        for major in RELEASE["cuda"]:
            if options.partial and not list(dist.glob(WHEELS[f"cuda{major}"]["file"])):
                continue
            resolve(install, major, folder)
            run(*install, f"jax-flash-cuda{major}=={version()}", cwd=folder)
            run_program(python, f"load_cuda{major}.py", LOAD.format(major=major), folder)


def run_program(python: str | Path, name: str, text: str, folder: str) -> None:
    (Path(folder) / name).write_text(text)
    run(python, name, cwd=folder)


def resolve(install: list[str | Path], major: str, folder: str) -> None:
    """Checks that pip would install the folder's wheel and jax's plugin for the extra."""
    extra = f"jax-flash[cuda{major}]=={version()}"
    done = subprocess.run(
        [*(x for x in install if x != "-q"), "--dry-run", "--ignore-installed", extra],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    would = done.stdout.strip().split("\n")[-1]
    wanted = f"jax-flash-cuda{major}-{version()}", f"jax-cuda{major}-plugin-"
    if done.returncode or not all(name in would.replace("_", "-") for name in wanted):
        sys.exit(f"{extra} does not resolve: {would}\n{done.stderr}")
    print(f"{extra}: {would}")


if __name__ == "__main__":
    main()
