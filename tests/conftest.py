"""Eight CPU devices, quiet logs, and the implementations under test.

JAX_FLASH_TEST_IMPLEMENTATION (default "cpu") names the custom call that the whole suite runs against.
"""

import gc
import os
from importlib.metadata import version

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's, in the oracle: pytest's workers share the cores
IMPLEMENTATION = os.environ.get("JAX_FLASH_TEST_IMPLEMENTATION", "cpu")
_FLAGS = ["--xla_force_host_platform_device_count=8"]
if IMPLEMENTATION == "cuda":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # pytest's workers share the GPU
else:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Most of the suite's time is LLVM compiling small programs that run once; without optimisation it halves.
    _FLAGS.append("--xla_backend_optimization_level=0")
    # One LLVM module per program, because pytest's workers share the cores.
    _FLAGS.append("--xla_cpu_parallel_codegen_split_count=1")
    # Code for fusions takes a fifth of the suite's time. jaxlib 0.11 no longer has this flag.
    if version("jaxlib") < "0.11":
        _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([*_FLAGS, os.environ.get("XLA_FLAGS", "")]).strip()

import jax  # noqa: E402
import pytest  # noqa: E402
from jax._src.interpreters import mlir  # noqa: E402
from jax.sharding import AxisType  # noqa: E402
from meshes import make_mesh  # noqa: E402
from programs import require_devices  # noqa: E402

from jax_flash.backends import cuda_library  # noqa: E402

IMPLEMENTATIONS = tuple(dict.fromkeys((IMPLEMENTATION, "xla")))


if IMPLEMENTATION != "cuda" and hasattr(mlir, "JaxIrContext"):
    # JAX loads dialects for several GPU languages into the MLIR context of each program. Lowering for the CPU needs one
    # of them; without the others small programs compile in four fifths of the time.
    mlir.JaxIrContext.load_all_available_dialects = lambda context: context.dialects["func"]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    """Each implementation that a promise of the contract is tested on."""
    return request.param


@pytest.fixture
def kernel():
    """The custom call under test, for promises that plain JAX does not make."""
    if IMPLEMENTATION == "xla":
        pytest.skip("plain JAX has no custom call")
    return IMPLEMENTATION


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def axis_type(request):
    """Both types of mesh axes over which XLA splits a call; jax.make_mesh makes explicit ones by default."""
    return request.param


@pytest.fixture
def mesh(axis_type):
    """2 × 4 devices, data × model."""
    return make_mesh(axis_type, axis_type)


@pytest.fixture
def automatic():
    """The same with automatic axes alone."""
    return make_mesh(AxisType.Auto, AxisType.Auto)


@pytest.fixture
def cube(axis_type):
    """2 × 2 × 2 devices, data × ring × model."""
    require_devices(8)
    return jax.make_mesh((2, 2, 2), ("data", "ring", "model"), (axis_type,) * 3)


def pytest_collection_modifyitems(config, items):
    """Explicit axes change only how JAX traces a call, so with them only the first case of each test runs."""
    first, others = {}, []
    for item in items:
        case = getattr(item, "callspec", None)
        if case and case.params.get("axis_type") is AxisType.Explicit:
            test = item.nodeid.partition("[")[0]
            if first.setdefault(test, item) is not item:
                others.append(item)
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in set(others)]


@pytest.fixture
def exact_products():
    """JAX's own float32 products in float32: on a GPU they would be TF32, which misses the tolerances."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def lowers_for_cuda():
    """Skips if a CUDA library is installed but not under test: lowering asks it for head dims that it may lack."""
    if IMPLEMENTATION != "cuda" and cuda_library() is not None:
        pytest.skip("the CUDA library of this machine may lack the head dims")


def pytest_collection_finish():
    """Excludes the modules imported so far from garbage collection, which took 4% of the time."""
    gc.freeze()
    gc.set_threshold(5000, 20, 20)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skips what the CUDA library was not built with, recognised by the error that tells a user so."""
    try:
        return (yield)
    except NotImplementedError as error:
        if IMPLEMENTATION == "cuda" and "no CUDA kernel was built" in str(error):
            pytest.skip(str(error))
        raise
