"""Lays out a CUDA toolkit that can build jax_flash, without root: `python tools/fetch_cuda.py MAJOR PREFIX`.

packages/release.json names what is fetched, some 110 MB. For CUDA 13, NVIDIA's wheels are enough: they have nvcc and
the static runtime. The wheels of CUDA 12 lack both. There nvcc comes from Debian's package nvidia-cuda-toolkit, and the
name of the static runtime becomes a link to libcudart.so.12. CUDA 12 also uses the program fatbinary of CUDA 13, which
compresses machine code by a third more (--compress-mode=size; drivers since CUDA 12.4's, 550.54.14, can read it).
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
from pathlib import Path, PurePosixPath

from release import RELEASE, run

DEBIAN = "https://deb.debian.org/debian"
SUITE = "dists/trixie/non-free/binary-amd64/Packages.xz"
FATBINARY = "nvidia/cu13/bin/fatbinary"
# The paths of the Debian package, and those at which nvcc looks for the same files.
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
CICC_PATH = $(TOP)/nvvm/bin
NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice
PATH += $(CICC_PATH):$(_HERE_):
INCLUDES += "-I$(TOP)/include" $(_SPACE_)
SYSTEM_INCLUDES += "-isystem" "$(TOP)/include/cccl" $(_SPACE_)
LIBRARIES =+ $(_SPACE_) "-L$(TOP)/lib64"
"""
# CUDA 12's wheels have no static libraries.
STAND_INS = {
    "libcudart_static.a": b"INPUT(libcudart.so.12)\n",  # a linker script
    "libcudadevrt.a": b"!<arch>\n",  # empty: nvcc names it when it links, but nothing uses it
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("major", choices=RELEASE["cuda"])
    parser.add_argument("prefix", type=Path)
    options = parser.parse_args()
    lay_out(RELEASE["cuda"][options.major], options.prefix)


def lay_out(toolkit: dict, prefix: Path) -> None:
    """Installs an entry of release.json's `cuda` at the prefix, unless exactly this entry is installed there."""
    complete = prefix / ".complete"
    if complete.exists() and complete.read_text() == repr(toolkit):
        return
    shutil.rmtree(prefix, ignore_errors=True)
    if "debian" in toolkit:
        unpack_programs(fetch_package(toolkit["debian"]), prefix)
        (prefix / "lib64").mkdir()
        for name, content in STAND_INS.items():
            (prefix / "lib64" / name).write_bytes(content)
    unpack_wheels(toolkit["wheels"], prefix, all_programs="debian" not in toolkit)
    (prefix / "bin/nvcc.profile").write_text(NVCC_PROFILE)
    (runtime,) = (prefix / "lib64").glob("libcudart.so.*")
    (prefix / "lib64/libcudart.so").symlink_to(runtime.name)
    run(prefix / "bin/nvcc", "--version")
    complete.write_text(repr(toolkit))


def fetch_package(name: str) -> bytes:
    """The Debian package, checked against the archive's index."""
    index = lzma.decompress(fetch(f"{DEBIAN}/{SUITE}")).decode()
    stanza = next(s for s in index.split("\n\n") if s.startswith(f"Package: {name}\n"))
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


def unpack_wheels(wheels: list[str], prefix: Path, all_programs: bool) -> None:
    """Copies nvidia/<package>/<folder>/… of each wheel to its place. Without `all_programs`, the only program that it
    copies is FATBINARY."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*command, "-d", folder, *wheels], check=True)
        for wheel in sorted(Path(folder).glob("*.whl")):
            with zipfile.ZipFile(wheel) as files:
                names = files.namelist()
                if not all_programs and FATBINARY in names:
                    names = [FATBINARY]
                for name in names:
                    target = place(name, programs=all_programs or name == FATBINARY)
                    if target is not None:
                        to = prefix / target
                        to.parent.mkdir(parents=True, exist_ok=True)
                        to.write_bytes(files.read(name))
                        to.chmod(0o755 if to.parent.name == "bin" else 0o644)


def place(name: str, programs: bool) -> PurePosixPath | None:
    """The place of a wheel's file under the prefix; None if a build does not need it."""
    parts = PurePosixPath(name).parts
    folders = {"include": "include", "lib": "lib64"} | ({"bin": "bin", "nvvm": "nvvm"} if programs else {})
    if len(parts) < 4 or parts[0] != "nvidia" or parts[2] not in folders or name.endswith((".py", "/")):
        return None
    return PurePosixPath(folders[parts[2]], *parts[3:])


if __name__ == "__main__":
    main()
