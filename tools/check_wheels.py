"""Checks the wheels in a folder as a release needs them: `python tools/check_wheels.py [dist] [--partial]`.

Every wheel of packages/release.json must be there and have the version of jax_flash/_version.py; the folder may hold
nothing else but the sdist. A wheel's contents must run on the glibc that its tag names, which must be no newer than
release.json's; its size must be within the limit; its metadata must render on the package index; and an abi3 wheel must
use only the stable ABI. --partial checks only the wheels that are there. --any-glibc allows a newer glibc, as in wheels
built on a developer's machine.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

from release import RELEASE, WHEELS, version

LIBRARY = "libjax_flash_cuda.so"
CHECKERS = ("auditwheel", "abi3audit", "twine")


def problems_of(wheel: Path, name: str, bin_: Path, any_glibc: bool) -> list[str]:
    """The faults of the file of this entry of `wheels`; empty if there are none."""
    found = [*wrong_contents(wheel, name), *wrong_tag(wheel, bin_, any_glibc)]
    megabytes = wheel.stat().st_size / 1e6
    if megabytes > RELEASE["max_megabytes"]:
        found.append(f"has {megabytes:.1f} MB, more than {RELEASE['max_megabytes']}")
    if wheel.name.split("-")[1] != version():
        found.append(f"is of version {wheel.name.split('-')[1]}, jax_flash/_version.py has {version()}")
    if "-abi3-" in wheel.name:
        found += refusal(bin_ / "abi3audit", "--strict", wheel)
    return found + refusal(bin_ / "twine", "check", "--strict", wheel)


def wrong_contents(wheel: Path, name: str) -> list[str]:
    names = zipfile.ZipFile(wheel).namelist()
    package, cuda = wheel.name.split("-")[0], "cuda" in WHEELS[name]
    libraries = [x for x in names if x.endswith(".so") or ".so." in x]
    wanted = rf"{package}/{LIBRARY}" if cuda else rf"{package}/_core\.[\w-]*\.?so"
    found = [f"has {x}" for x in libraries if not re.fullmatch(wanted, x)]
    found += [] if libraries else ["has no library"]
    folders = {x.split("/")[0] for x in names} - {package}
    return found + [f"has {x}/" for x in folders if not x.endswith(".dist-info")]


def wrong_tag(wheel: Path, bin_: Path, any_glibc: bool) -> list[str]:
    """The faults of the wheel's tag, compared with the tag that auditwheel finds, and with release.json."""
    machine, newest = RELEASE["platform"]["machine"], RELEASE["platform"]["glibc"]
    said = subprocess.run([bin_ / "auditwheel", "show", wheel], capture_output=True, text=True)
    pattern = rf'"manylinux_(\d+)_(\d+)_{machine}"'
    consistent = re.search(pattern, said.stdout.replace("\n", " "))
    tags = re.findall(rf"manylinux_(\d+)_(\d+)_{machine}", wheel.name)
    if not consistent or not tags:
        return [f"has no manylinux tag that auditwheel confirms: {said.stdout.strip()} {said.stderr.strip()}"]
    needs, claimed = as_numbers(consistent.groups()), min(map(as_numbers, tags))
    found = [] if needs <= claimed else [f"claims glibc {claimed}, needs {needs}"]
    if not any_glibc and needs > as_numbers(newest.split(".")):
        found.append(f"needs glibc {needs}, newer than {newest}")
    return found


def as_numbers(parts: object) -> tuple[int, ...]:
    return tuple(map(int, parts))


def refusal(*command: str | Path) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True)
    return [f"{command[0].name}: {done.stdout.strip()} {done.stderr.strip()}"] if done.returncode else []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dist", type=Path, nargs="?", default=Path("dist"))
    parser.add_argument("--partial", action="store_true")
    parser.add_argument("--any-glibc", action="store_true")
    options = parser.parse_args()
    failed, seen = [], set(options.dist.glob("*.tar.gz"))
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        bin_ = Path(folder) / "bin"
        subprocess.run([bin_ / "pip", "install", "-q", *CHECKERS], check=True)
        for name, entry in WHEELS.items():
            files = list(options.dist.glob(entry["file"]))
            seen |= set(files)
            if len(files) != 1 and not (options.partial and not files):
                failed.append(f"{name}: {len(files)} files {entry['file']}")
            for file in files:
                wrong = problems_of(file, name, bin_, options.any_glibc)
                failed += [f"{file.name} {problem}" for problem in wrong]
                print(f"{'wrong' if wrong else 'right'}  {file.stat().st_size / 1e6:5.1f} MB  {file.name}")
    failed += [
        f"{file.name}: no wheel of packages/release.json" for file in set(options.dist.iterdir()) - seen
    ]
    sys.exit("\n".join(failed) or None if seen else f"nothing to check in {options.dist}")


if __name__ == "__main__":
    main()
