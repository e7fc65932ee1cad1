"""Eight CPU devices, quiet logs, and the implementations under test.

JAX_FLASH_TEST_IMPLEMENTATION (default "cpu") names the custom call that the whole suite runs against.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_PLATFORMS", "" if os.environ.get("JAX_FLASH_TEST_IMPLEMENTATION") == "cuda" else "cpu")
_DEVICES = "--xla_force_host_platform_device_count=8"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()

import pytest  # noqa: E402

IMPLEMENTATION = os.environ.get("JAX_FLASH_TEST_IMPLEMENTATION", "cpu")
IMPLEMENTATIONS = tuple(dict.fromkeys((IMPLEMENTATION, "xla")))


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
