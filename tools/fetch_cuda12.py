"""Lays out a CUDA 12.4 toolkit that can build jax_flash: `python tools/fetch_cuda12.py PREFIX`, no root needed.

nvcc comes from Debian's package nvidia-cuda-toolkit (PyPI's has only ptxas), headers and the runtime from NVIDIA's
wheels, fatbinary from CUDA 13's: it compresses machine code by a third more (--compress-mode=size, which drivers from
550.54.14 on read, CUDA 12.4's own). About 140 MB are fetched. There is no static runtime among them: its name leads to
libcudart.so.12.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from pathlib import Path

DEBIAN = "https://deb.debian.org/debian"
SUITE = "dists/trixie/non-free/binary-amd64/Packages.xz"
DEBIAN_PACKAGE = "nvidia-cuda-toolkit"
WHEELS = (
    "nvidia-cuda-runtime-cu12==12.4.127",
    "nvidia-cuda-nvcc-cu12==12.4.131",
    "nvidia-cuda-cccl-cu12==12.9.27",
    "nvidia-cuda-nvcc==13.0.88",  # for FATBINARY alone
)
FATBINARY = "nvidia/cu13/bin/fatbinary"
# Where the Debian package has them, and where nvcc looks for them.
PROGRAMS = {f"./usr/bin/{name}": f"bin/{name}" for name in ("bin2c", "cudafe++", "nvlink", "ptxas")}
PROGRAMS |= {
    "./usr/lib/nvidia-cuda-toolkit/bin/crt/link.stub": "bin/crt/link.stub",
    "./usr/lib/nvidia-cuda-toolkit/bin/crt/prelink.stub": "bin/crt/prelink.stub",
    "./usr/lib/nvidia-cuda-toolkit/bin/nvcc": "bin/nvcc",
    "./usr/lib/nvidia-cuda-toolkit/bin/cicc": "nvvm/bin/cicc",
    "./usr/lib/nvidia-cuda-toolkit/libdevice/libdevice.10.bc": "nvvm/libdevice/libdevice.10.bc",
}
NVCC_PROFILE = """\
TOP = $(_HERE_)/..
NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice
PATH += $(TOP)/nvvm/bin:$(_HERE_):
INCLUDES += "-I$(TOP)/include" $(_SPACE_)
LIBRARIES =+ $(_SPACE_) "-L$(TOP)/lib64"
"""
LIBRARIES = {
    "libcudart_static.a": b"INPUT(libcudart.so.12)\n",  # a linker script
    "libcudadevrt.a": b"!<arch>\n",  # the device runtime, empty: nvcc names it when it links, nothing here uses it
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prefix", type=Path)
    prefix = parser.parse_args().prefix
    if (prefix / ".complete").exists():
        return
    shutil.rmtree(prefix, ignore_errors=True)
    unpack_programs(fetch_package(), prefix)
    unpack_wheels(prefix)
    (prefix / "bin/nvcc.profile").write_text(NVCC_PROFILE)
    for name, content in LIBRARIES.items():
        (prefix / "lib64" / name).write_bytes(content)
    (prefix / "lib64/libcudart.so").symlink_to("libcudart.so.12")
    print(
        subprocess.run([prefix / "bin/nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    )
    (prefix / ".complete").touch()


def fetch_package() -> bytes:
    """The Debian package, checked against the archive's index."""
    index = lzma.decompress(fetch(f"{DEBIAN}/{SUITE}")).decode()
    stanza = next(s for s in index.split("\n\n") if s.startswith(f"Package: {DEBIAN_PACKAGE}\n"))
    fields = dict(line.split(": ", 1) for line in stanza.splitlines() if ": " in line and line[0] != " ")
    package = fetch(f"{DEBIAN}/{fields['Filename']}")
    if hashlib.sha256(package).hexdigest() != fields["SHA256"]:
        sys.exit(f"{fields['Filename']}: not what the archive's index says (SHA256)")
    return package


def fetch(url: str) -> bytes:
    print(f"fetching {url}", flush=True)
    with urllib.request.urlopen(url) as response:
        return response.read()


def unpack_programs(package: bytes, prefix: Path) -> None:
    """A .deb is an ar archive whose member data.tar.xz holds the files."""
    with tarfile.open(fileobj=io.BytesIO(ar_member(package, "data.tar")), mode="r:*") as files:
        for source, target in PROGRAMS.items():
            to = prefix / target
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(files.extractfile(source).read())
            to.chmod(0o755)


def ar_member(archive: bytes, prefix: str) -> bytes:
    """The first member of an ar archive whose name begins with `prefix`."""
    at = 8
    while at < len(archive):
        name, size = archive[at : at + 16].decode().strip(), int(archive[at + 48 : at + 58])
        if name.startswith(prefix):
            return archive[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    sys.exit(f"no {prefix} in the Debian package")


def unpack_wheels(prefix: Path) -> None:
    """nvidia/<package>/{include,lib} of each CUDA 12 wheel to {include,lib64}; FATBINARY to bin."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*command, "-d", folder, *WHEELS], check=True)
        for wheel in sorted(Path(folder).glob("*.whl")):
            with zipfile.ZipFile(wheel) as files:
                if FATBINARY in files.namelist():
                    (prefix / "bin/fatbinary").write_bytes(files.read(FATBINARY))
                    (prefix / "bin/fatbinary").chmod(0o755)
                    continue
                for name in files.namelist():
                    parts = Path(name).parts
                    if len(parts) < 4 or parts[2] not in ("include", "lib") or name.endswith((".py", "/")):
                        continue
                    to = prefix / ("lib64" if parts[2] == "lib" else "include") / Path(*parts[3:])
                    to.parent.mkdir(parents=True, exist_ok=True)
                    to.write_bytes(files.read(name))


if __name__ == "__main__":
    main()
