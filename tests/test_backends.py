"""backends() reports what is installed, built and found, whatever is missing, without crashing."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from jax_flash import __main__ as command
from jax_flash.backends import Backend, CudaLibrary, Kernel

backends = sys.modules["jax_flash.backends"]  # the module: the package has a function of that name
CACHED = (backends._load_core, backends._load_cuda)


@pytest.fixture(autouse=True)
def fresh():
    """Every test searches for the libraries again."""
    yield
    for function in CACHED:
        function.cache_clear()


@pytest.fixture
def without_core(monkeypatch):
    """Removes the extension, as in a source tree that was not built."""
    real = importlib.import_module

    def missing(name, package=None):
        if name == "._core":
            raise ModuleNotFoundError("No module named 'jax_flash._core'")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", missing)
    for function in CACHED:
        function.cache_clear()


@pytest.fixture
def core(monkeypatch, tmp_path):
    """An extension of version 1.2.3 that lies in tmp_path and opens a CUDA library with two rows."""
    fake = SimpleNamespace(
        __file__=str(tmp_path / "_core.so"),
        version=lambda: "1.2.3",
        cpu_isa=lambda: "avx2",
        registrations=lambda: {},
        load_cuda=lambda path: {"jax_flash_forward": object()},
        covers=lambda arch, capability: True,
        cuda_kernels=lambda: [
            ("sm80", "forward", 128, 128, ("float16", "bfloat16"), ("dense", "paged"), "tiles"),
            ("sm80", "forward", 192, 128, ("bfloat16",), ("dense",), "tiles"),
        ],
    )
    monkeypatch.setattr(backends, "_load_core", lambda: (fake, None))
    backends._load_cuda.cache_clear()
    return fake


def wheel(folder: Path, major: int, version: str) -> None:
    """A `jax-flash-cudaN` as pip would install it, with an empty library."""
    package = folder / f"jax_flash_cuda{major}"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / backends.CUDA_LIBRARY).touch()
    info = folder / f"jax_flash_cuda{major}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: jax-flash-cuda{major}\nVersion: {version}\n"
    )


def named(name: str) -> Backend:
    return next(backend for backend in backends.backends() if backend.implementation == name)


def gpu(capability: str):
    return SimpleNamespace(platform="gpu", device_kind="A card", compute_capability=capability)


def test_the_three_implementations_are_told_and_xla_always_runs():
    assert [backend.implementation for backend in backends.backends()] == ["cpu", "cuda", "xla"]
    assert named("xla").problem is None
    assert set(jax.local_devices()) <= set(named("xla").devices)


def test_the_built_extension_runs_every_pass_and_dtype_on_the_cpu():
    cpu = named("cpu")
    assert cpu.problem is None
    assert set(cpu.passes) >= {"forward", "backward", "bias_gradient"}
    assert cpu.dtypes == ("float16", "bfloat16", "float32")
    assert cpu.archs[0]
    assert cpu.devices == tuple(jax.local_devices(backend="cpu"))
    backends.require_cpu("test")


def test_registering_twice_is_harmless():
    backends.register.cache_clear()
    backends.register()
    backends.register.cache_clear()
    backends.register()


def test_without_the_extension_cpu_raises_and_names_xla(without_core):
    problem = named("cpu").problem
    assert problem.startswith("not built: this is a source tree, which hides an installed jax_flash")
    assert "`pip install -e .`" in problem
    assert named("cpu").devices == ()
    with pytest.raises(NotImplementedError, match=r'flash_attention: .*"cpu" is not built.*"xla" runs here'):
        backends.require_cpu("flash_attention")
    backends.register.__wrapped__()  # nothing to register, and no error: it runs at import


def test_an_extension_that_does_not_load_says_why(monkeypatch):
    def broken(name, package=None):
        raise ImportError("libstdc++.so.6: version `GLIBCXX_3.4.99' not found")

    monkeypatch.setattr(importlib, "import_module", broken)
    backends._load_core.cache_clear()
    assert "GLIBCXX_3.4.99" in named("cpu").problem


def test_an_instruction_set_that_the_machine_lacks_is_told_not_thrown():
    environment = os.environ | {"JAX_FLASH_CPU_ISA": "mmx"}
    assert '"cpu" is not usable: jax_flash: JAX_FLASH_CPU_ISA is "mmx"' in run_command(env=environment).stdout


@pytest.mark.parametrize("major", [12, 13])
def test_a_missing_cuda_library_names_the_extra_that_matches_the_installed_plugin(
    major, core, monkeypatch, tmp_path
):
    (tmp_path / f"jax_cuda{major}_plugin").mkdir()
    monkeypatch.setattr(backends.importlib.util, "find_spec", only_in(tmp_path))
    problem = named("cuda").problem
    assert problem == (
        "not installed: in a clone of the repository JAX_FLASH_CUDA=ON pip install . where nvcc is, "
        f'or pip install "jax-flash[cuda{major}]" where an index or --find-links has its wheel'
    )


def only_in(folder: Path):
    """find_spec for an environment that holds just this folder's packages."""

    def find(name):
        package = folder / name
        return SimpleNamespace(origin=str(package / "__init__.py")) if package.exists() else None

    return find


def test_the_wheel_of_the_plugins_cuda_major_is_used(core, monkeypatch, tmp_path):
    for major in (12, 13):
        wheel(tmp_path, major, "1.2.3")
    (tmp_path / "jax_cuda12_plugin").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(backends.importlib.util, "find_spec", only_in(tmp_path))
    assert named("cuda").library == tmp_path / "jax_flash_cuda12" / backends.CUDA_LIBRARY


def test_a_wheel_of_another_version_is_not_loaded(core, monkeypatch, tmp_path):
    wheel(tmp_path, 13, "1.2.2")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(backends.importlib.util, "find_spec", only_in(tmp_path))
    problem = "of another version: jax-flash-cuda13 is 1.2.2, jax-flash is 1.2.3"
    assert named("cuda").problem == f"{problem}; pip install jax-flash-cuda13==1.2.3"
    backends.register.__wrapped__()  # registration at import skips it without an error
    monkeypatch.setattr(backends, "local_devices", lambda platform: (gpu("9.0"),))
    with pytest.raises(NotImplementedError, match=f'"cuda" is {problem}'):
        backends.require_cuda("flash_attention")


def test_a_wheel_without_metadata_is_asked_for_its_version_itself(core, monkeypatch, tmp_path):
    wheel(tmp_path, 13, "1.2.3")
    (tmp_path / "jax_flash_cuda13-1.2.3.dist-info" / "METADATA").unlink()
    monkeypatch.setattr(backends.importlib.util, "find_spec", only_in(tmp_path))
    assert named("cuda").library == tmp_path / "jax_flash_cuda13" / backends.CUDA_LIBRARY


def test_a_library_built_from_source_comes_first_and_its_rows_are_told(core, tmp_path):
    (tmp_path / backends.CUDA_LIBRARY).touch()
    cuda = named("cuda")
    assert cuda.library == tmp_path / backends.CUDA_LIBRARY
    assert (cuda.archs, cuda.passes, cuda.dtypes) == (("sm80",), ("forward",), ("float16", "bfloat16"))
    assert cuda.head_dims == ((128, 128), (192, 128))


def test_a_library_that_does_not_load_says_why(core, tmp_path):
    def refuse(path):
        raise RuntimeError("undefined symbol")

    (tmp_path / backends.CUDA_LIBRARY).touch()
    core.load_cuda = refuse
    assert named("cuda").problem == "not loadable: undefined symbol"


def test_lowering_for_cuda_without_a_library_is_refused_only_beside_a_cuda_device(without_core, monkeypatch):
    monkeypatch.setattr(backends, "local_devices", lambda platform: ())
    backends.require_cuda("flash_attention")  # an export for another machine
    monkeypatch.setattr(backends, "local_devices", lambda platform: (gpu("9.0"),))
    with pytest.raises(NotImplementedError, match=r'"cuda" is not built.*"xla" runs here'):
        backends.require_cuda("flash_attention")


@pytest.mark.parametrize(
    ("family", "capability", "runs"),
    [
        ("sm80", "8.0", True),
        ("sm80", "8.9", True),
        ("sm80", "12.0", True),
        ("sm80", "7.5", False),
        ("sm75", "7.5", True),
        ("sm75", "8.0", True),
        ("sm75", "7.0", False),
        ("sm90", "9.0", True),
        ("sm90", "10.0", False),
    ],
)
def test_a_family_runs_on_its_own_cards_and_sm75_and_sm80_on_every_newer_one(
    family, capability, runs, monkeypatch
):
    library = CudaLibrary(Path("x.so"), (Kernel(family, "forward", 64, 64, ("float16",)),), {})
    monkeypatch.setattr(backends, "_load_cuda", lambda: (library, None))
    reason = backends.why_not_on(gpu(capability))
    assert (reason is None) == runs
    if not runs:
        assert family in reason
        assert capability.replace(".", "") in reason


def test_the_command_prints_versions_implementations_and_what_each_device_runs():
    lines = run_command().stdout.splitlines()
    assert lines[0].startswith("jax_flash ")
    assert f"jax {jax.__version__}" in lines[0]
    for name in ("cpu", "cuda", "xla"):
        assert any(line.startswith(name) for line in lines)
    assert any('runs "cpu"' in line for line in lines)


@pytest.mark.parametrize("platform", ["cuda", "rocm", "nothing"])
def test_the_command_runs_where_jax_cannot_start_a_backend(platform):
    """JAX raises an AssertionError or a RuntimeError for a platform whose plugin is missing."""
    if jax.default_backend() == "gpu" and platform != "nothing":
        pytest.skip("jax has a plugin for this machine's GPU")
    told = run_command(env=os.environ | {"JAX_PLATFORMS": platform})
    assert told.stdout.splitlines()[-1] == "no device: jax could not start a backend"


def test_the_command_fails_only_where_something_required_is_missing(without_core, capsys):
    assert command.main([]) == 0
    assert command.main(["--require-built", "cpu"]) == 1
    assert "pip install -e ." in capsys.readouterr().out


def run_command(env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "jax_flash"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=env)
