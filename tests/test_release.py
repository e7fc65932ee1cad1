"""packages/release.json describes a release once. Files that cannot read it must agree with it."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from jax_flash import __version__

ROOT = Path(__file__).parent.parent
RELEASE = json.loads((ROOT / "packages" / "release.json").read_text())
CUDA = RELEASE["cuda"]


def project(folder: str) -> dict:
    return tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]


def tool(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tools" / "release.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_every_wheel_has_its_project():
    for name, wheel in RELEASE["wheels"].items():
        assert wheel["file"].startswith(project(wheel["source"])["name"].replace("-", "_") + "-"), name


def test_each_cuda_major_has_a_wheel_and_an_extra():
    text = (ROOT / "pyproject.toml").read_text()
    for major in CUDA:
        assert RELEASE["wheels"][f"cuda{major}"]["cuda"] == major
        assert f'cuda{major} = ["jax-flash-cuda{major}==' in text


def test_the_cuda_12_wheel_asks_for_the_runtime_it_was_linked_with():
    assert project("packages/jax-flash-cuda12")["dependencies"] == [
        f"nvidia-cuda-runtime-cu12>={CUDA['12']['toolkit']}"
    ]


def test_the_page_on_installing_names_the_architectures_of_the_wheels():
    (sentence,) = re.findall(
        r"The CUDA wheels hold\s+machine code for ([^;]*);", (ROOT / "docs" / "install.md").read_text()
    )
    # Parentheses hold the architectures that run another one's machine code.
    named = re.sub(r"\([^)]*\)", "", sentence)
    assert re.findall(r"sm_(\d+)", named) == [re.match(r"\d+", arch)[0] for arch in RELEASE["archs"]]


def test_the_citation_has_the_version():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_only_a_tag_that_equals_the_version_is_released():
    assert tool("tag", f"v{__version__}").returncode == 0
    wrong = tool("tag", "v99.0.0")
    assert wrong.returncode == 1
    assert wrong.stderr == (
        f"the tag is v99.0.0, jax_flash/_version.py has {__version__}: tag v{__version__}\n"
    )


def test_the_workflow_repeats_its_jobs_over_the_list():
    outputs = dict(line.split("=", 1) for line in tool("matrix").stdout.splitlines())
    assert json.loads(outputs["wheels"]) == list(RELEASE["wheels"])
    assert json.loads(outputs["pythons"]) == RELEASE["tried_on"]
    workflow = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    assert set(re.findall(r"needs\.plan\.outputs\.(\w+)", workflow)) == set(outputs)


@pytest.mark.parametrize("workflow", ["checks.yml", "release.yml"])
def test_actions_are_pinned_to_commits(workflow):
    used = re.findall(r"uses: (.*)", (ROOT / ".github" / "workflows" / workflow).read_text())
    assert used
    for action in used:
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", action), action


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_a_build_for_no_named_arch_is_for_those_of_the_release(tmp_path):
    script = tmp_path / "archs.cmake"
    script.write_text(
        f'include("{ROOT}/cmake/settings.cmake")\njf_released_archs(archs)\nmessage("${{archs}}")\n'
    )
    done = subprocess.run(["cmake", "-P", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == ";".join(RELEASE["archs"])


@pytest.mark.parametrize(
    ("name", "files", "wrong"),
    [
        ("cuda13", ["jax_flash_cuda13/libjax_flash_cuda.so"], []),
        ("cuda13", ["jax_flash_cuda13/__init__.py"], ["has no library"]),
        ("base-cp312", ["jax_flash/_core.abi3.so"], []),
        (
            "base-cp312",
            ["jax_flash/_core.abi3.so", "jax_flash/libjax_flash_cuda.so"],
            ["has jax_flash/libjax_flash_cuda.so"],
        ),
        ("base-cp311", ["jax_flash/_core.cpython-311-x86_64-linux-gnu.so", "tests/x.py"], ["has tests/"]),
    ],
)
def test_a_wheel_holds_its_library_and_nothing_of_another(tmp_path, monkeypatch, name, files, wrong):
    monkeypatch.syspath_prepend(ROOT / "tools")
    from check_wheels import wrong_contents

    wheel = tmp_path / RELEASE["wheels"][name]["file"].replace("*", "0")
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in [*files, "x.dist-info/METADATA"]:
            archive.writestr(file, "")
    assert wrong_contents(wheel, name) == wrong
