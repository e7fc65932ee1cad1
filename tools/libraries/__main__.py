"""Runs the libraries' tests, each in an environment of its own: `python -m tools.libraries [NAME…]`, `make libraries`.

Environments and downloads are kept in build/libraries. The table, docs/libraries.md, keeps the rows of libraries that
were not run. The exit status is 1 where a test failed that has no known reason.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tarfile
import tomllib
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "libraries.md"
PINS = tomllib.loads(Path(__file__).with_name("pins.toml").read_text())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("libraries", nargs="*", metavar="NAME", help=f"of {', '.join(PINS)}")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "libraries")
    parser.add_argument(
        "--checkouts",
        type=Path,
        help="a folder with clones (FOLDER/maxtext) of libraries whose tests are on no registry",
    )
    parser.add_argument("--in-place", action="store_true", help="test the extension built in the tree")
    parser.add_argument("--keep-page", action="store_true", help="print the rows, do not write the page")
    options = parser.parse_args()
    unknown = set(options.libraries) - set(PINS)
    if unknown:
        parser.error(f"no library {', '.join(sorted(unknown))}; there are {', '.join(PINS)}")
    if sys.version_info < (3, 12):
        parser.error(f"needs Python 3.12 or newer, as MaxText does; this is {sys.version.split()[0]}")
    folder = options.folder.resolve()
    wheel = None if options.in_place else build_wheel(folder)
    failed = False
    for name in options.libraries or PINS:
        if "repository" in PINS[name] and checkout_of(name, PINS[name], options.checkouts) is None:
            print(f"{name} left out: its tests are in its repository alone (--checkouts)", flush=True)
            continue
        row = run_library(name, PINS[name], folder / name, wheel, options.checkouts)
        failed |= bool(row.pop("failed"))
        text = line(row)
        print(text, flush=True)
        if not options.keep_page:
            PAGE.write_text(with_row(PAGE.read_text(), text))
    return int(failed)


def build_wheel(folder: Path) -> Path:
    """jax_flash's wheel for this Python."""
    wheels = folder / "wheel"
    for old in wheels.glob("*.whl"):
        old.unlink()
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", wheels, ROOT)
    return next(wheels.glob("*.whl"))


def run_library(
    name: str, pin: dict[str, Any], folder: Path, wheel: Path | None, checkouts: Path | None
) -> dict[str, Any]:
    """Makes the environment and runs the library's file in it; the row, whatever happens."""
    row = dict(library=name, version="", passed=0, total=0, ours=0, calls=0, why_not="", failed=True)
    try:
        python = environment(pin, folder, wheel)
        settings = os.environ | {"JAX_PLATFORMS": "cpu", **pin.get("environment", {})}
        if "source" in pin:
            settings["LIBRARY_SOURCE"] = str(unpacked(python, pin["source"], folder))
        checkout = checkout_of(name, pin, checkouts)
        if checkout is not None:
            settings["LIBRARY_CHECKOUT"] = str(checkout)
        if wheel is not None:  # The tree's package, which has no extension, must not hide the installed one.
            settings["PYTHONSAFEPATH"] = "1"
            settings["PYTHONPATH"] = str(tools_only(folder))
        status, last = watched([python, "-m", f"tools.libraries.{name}"], settings)
    except (subprocess.CalledProcessError, OSError) as error:
        return row | {"why_not": f"not installed: {error}"}
    if not last.startswith("{"):
        return row | {"why_not": f"its tests ended with status {status}"}
    row |= json.loads(last) | {"failed": status != 0}
    if checkout is not None:
        commit = subprocess.run(
            ["git", "-C", checkout, "rev-parse", "--short=10", "HEAD"],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
        row["version"] = f"{row['version']}, tests of {commit.strip()}"
    return row


def watched(command: list[Any], settings: dict[str, str]) -> tuple[int, str]:
    """The exit status and the last line of a command, whose output is printed as it comes."""
    last = ""
    with subprocess.Popen(command, cwd=ROOT, env=settings, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for text in process.stdout:
            print(text, end="", flush=True)
            last = text.strip() or last
    return process.returncode, last


def checkout_of(name: str, pin: dict[str, Any], checkouts: Path | None) -> Path | None:
    """The repository that was given for a library, if one was."""
    clone = pin.get("repository", pin.get("clone", name))
    folder = None if checkouts is None else (checkouts / clone).resolve()
    return folder if folder is not None and folder.exists() else None


def environment(pin: dict[str, Any], folder: Path, wheel: Path | None) -> Path:
    """The Python of the library's environment, installed again if its pin has changed."""
    python, stamp = folder / "venv" / "bin" / "python", folder / "installed.json"
    if not stamp.exists() or json.loads(stamp.read_text()) != pin:
        stamp.unlink(missing_ok=True)
        venv.create(folder / "venv", with_pip=True, clear=True)
        run(python, "-m", "pip", "install", "-q", *pin["install"])
        if "no_deps" in pin:
            run(python, "-m", "pip", "install", "-q", "--no-deps", *pin["no_deps"])
        stamp.write_text(json.dumps(pin))
    if wheel is not None:
        run(python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", wheel)
    return python


def unpacked(python: Path, requirement: str, folder: Path) -> Path:
    """The folder of a source distribution."""
    name = requirement.split("==")[0]
    target = folder / "source" / requirement
    if not target.exists():
        download = [
            "download",
            "-q",
            "--no-deps",
            "--no-binary",
            name,
            "-d",
            folder / "download",
            requirement,
        ]
        run(python, "-m", "pip", *download)
        archive = next((folder / "download").glob(f"*{requirement.split('==')[1]}.tar.gz"))
        with tarfile.open(archive) as tar:
            tar.extractall(target, filter="data")
    return next(target.iterdir())


def tools_only(folder: Path) -> Path:
    """A folder from which `tools` can be imported, but not the tree's jax_flash."""
    path = folder / "path"
    path.mkdir(parents=True, exist_ok=True)
    link = path / "tools"
    if not link.is_symlink():
        link.symlink_to(ROOT / "tools")
    return path


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    calls = f"{row['calls_close']} of {row['calls']}" if row["calls"] else "–"
    tests = [f"{row['passed']} of {row['total']}"] if row["total"] else []
    tests += [f"ours: {row['ours_passed']} of {row['ours']}"] if row["ours"] else []
    why = str(row["why_not"]).replace("|", "\\|")
    cells = (
        row["library"],
        row["version"],
        "; ".join(tests) or "none ran",
        calls,
        why,
        datetime.date.today(),
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def with_row(page: str, row: str) -> str:
    """The page with a library's row in the place of its old one; rows are in alphabetical order."""
    head, _, rows = page.rpartition("---|\n")
    found = {x.split("|")[1].strip(): x for x in [*rows.splitlines(), row]}
    return f"{head}---|\n" + "\n".join(found[name] for name in sorted(found)) + "\n"


def run(*command: object) -> None:
    subprocess.run([str(x) for x in command], check=True)


if __name__ == "__main__":
    sys.exit(main())
