"""What a release is made of, read from packages/release.json by every tool, CMake and the workflows.

python tools/release.py matrix            the job lists of .github/workflows/release.yml, as `name=JSON` lines
python tools/release.py tag v0.1.0        fails unless the tag names the version of jax_flash/_version.py
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RELEASE = json.loads((ROOT / "packages" / "release.json").read_text())
WHEELS: dict[str, dict[str, str]] = RELEASE["wheels"]


def version() -> str:
    text = (ROOT / "jax_flash" / "_version.py").read_text()
    return re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)[1]


def matrix() -> dict[str, str]:
    """The outputs of the workflow's first job; each value is JSON or plain text."""
    platform = RELEASE["platform"]
    return {
        "wheels": json.dumps(list(WHEELS)),
        "pythons": json.dumps(RELEASE["tried_on"]),
        "image": platform["image"],
        "compiler": platform["compiler"],
    }


def check_tag(tag: str) -> None:
    if tag != f"v{version()}":
        sys.exit(f"the tag is {tag}, jax_flash/_version.py has {version()}: tag v{version()}")


def run(*command: str | Path, **options: object) -> None:
    """Runs a command and shows it, as `make` does; a failure ends the tool."""
    print("+", shlex.join(map(str, command)), flush=True)
    done = subprocess.run(command, **options)
    if done.returncode:
        sys.exit(f"failed ({done.returncode}): {shlex.join(map(str, command))}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("matrix")
    commands.add_parser("tag").add_argument("tag")
    options = parser.parse_args()
    if options.command == "tag":
        check_tag(options.tag)
    else:
        print("\n".join(f"{name}={value}" for name, value in matrix().items()))


if __name__ == "__main__":
    main()
