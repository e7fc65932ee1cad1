"""Helpers for the tests of JAX's machinery: calls with all their gradients, the contents of compiled programs, and
programs in processes of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from jax.sharding import AxisType
from oracle import split

import jax_flash

TESTS = Path(__file__).parent
Arrays = dict[str, Any]
Call = Callable[[Arrays], Any]


def attention(case: Case, implementation: str | None = None, **options: Any) -> Call:
    """The public call of a case, as a function of its named arrays to (out, lse)."""
    fixed = case.layout == "fixed"
    function = jax_flash.flash_attention if fixed else jax_flash.flash_attention_varlen
    positional = ("query", "key", "value") + (() if fixed else ("cu_seqlens_q", "cu_seqlens_k"))
    options = case.options | {"implementation": implementation, "return_lse": True} | options

    def call(arrays: Arrays) -> Any:
        named = {name: x for name, x in arrays.items() if name not in positional}
        return function(*(arrays[name] for name in positional), **named, **options)

    return call


def with_gradients(call: Call) -> Call:
    """call's results, and the gradients, by argument name, of a weighted sum of all of them."""

    def run(arrays: Arrays) -> dict[str, Any]:
        moving, others = split(arrays)
        results, pullback = jax.vjp(lambda moving: call(moving | others), moving)
        return {"results": results, "gradients": pullback(jax.tree.map(weights, results))[0]}

    return run


def weights(x: Any) -> jax.Array:
    """A cotangent for x: different at every element, and the same in every program."""
    made = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape).astype(x.dtype)
    sharding = jax.typeof(x).sharding
    explicit = AxisType.Explicit in sharding.mesh.axis_types
    return jax.sharding.reshard(made, sharding) if explicit else made


def assert_same(got: Any, wanted: Any, *, tolerance: float = 1e-5) -> None:
    """Two trees of arrays agree up to the order of float32 sums; −inf where −inf is wanted, NaN nowhere."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert not np.isnan(a).any(), f"{jax.tree_util.keystr(path)} has NaN"
        scale = np.abs(b[np.isfinite(b)]).max(initial=1)
        np.testing.assert_allclose(
            a, b, rtol=tolerance, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path)
        )


_COLLECTIVE = (
    r"\s((?:all-(?:gather|reduce|to-all)|reduce-scatter|ragged-all-to-all|collective-\w+))(?:-start)?\("
)


def collectives(program: str) -> Counter[str]:
    """The collectives of a compiled program's text, asynchronous ones counted once (at their start)."""
    lines = (line.split(", metadata=")[0] for line in program.splitlines() if " = " in line)
    found = (re.search(_COLLECTIVE, line) for line in lines)
    return Counter(match[1] for match in found if match)


def custom_calls(program: str) -> Counter[str]:
    """This library's custom calls in a compiled program's text, by name without the common prefix."""
    return Counter(re.findall(r'custom_call_target="jax_flash_(\w+)"', program))


def shard_shapes(program: str, name: str) -> set[tuple[int, ...]]:
    """Shapes of the first result of every custom call of that name: what one device computes."""
    return _shapes(program, name, r" = \(?\w+\[([\d,]*)\]")


def key_shapes(program: str, name: str) -> set[tuple[int, ...]]:
    """Shapes of the second operand, key, of every custom call of that name."""
    return _shapes(program, name, r"operand_layout_constraints=\{\w+\[[\d,]*\]\S* \w+\[([\d,]*)\]")


def _shapes(program: str, name: str, pattern: str) -> set[tuple[int, ...]]:
    calls = (line for line in program.splitlines() if f'"jax_flash_{name}"' in line)
    found = (re.search(pattern, line) for line in calls)
    return {tuple(map(int, match[1].split(","))) for match in found if match}


def require_devices(count: int) -> None:
    """Skips the test on a machine with fewer devices. On the CPU 8 devices are forced; GPUs cannot be."""
    if jax.device_count() < count:
        pytest.skip(f"needs {count} devices")


def start_python(
    code: str, *arguments: str, devices: int = 1, platform: str = "cpu"
) -> subprocess.Popen[str]:
    """Runs code in a Python of its own, with as many CPU devices; it may import the tests' modules."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": platform if platform == "cpu" else f"{platform},cpu",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def report(process: subprocess.Popen[str], timeout: float = 120) -> Any:
    """What the process printed on its last line, as JSON."""
    try:
        out, error = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, error[-4000:]
    return json.loads(out.splitlines()[-1])


_BITS = """
import hashlib, json, os, sys
os.sched_setaffinity(0, json.loads(sys.argv[1]))
import jax, jax.numpy as jnp, jax_flash
bits = {}
def keep(case, **results):
    bits.update({f"{case}: {name}": hashlib.sha256(x.tobytes()).hexdigest() for name, x in results.items()})
"""


def assert_same_bits_on_one_thread_and_on_all(program: str) -> None:
    """Runs a program, which calls keep(case, out=…, …) for every case, on one CPU and on all of them.

    XLA's pool has a thread for each CPU. The failure names cases whose bits differ.
    """
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("no way to choose a process' CPUs here")
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) == 1:
        pytest.skip("one CPU only")
    whole = _BITS + program + "\nprint(json.dumps(bits))"
    alone, together = (report(start_python(whole, json.dumps(x)), timeout=300) for x in (cpus[:1], cpus))
    assert alone
    assert alone.keys() == together.keys()
    different = [case for case in alone if alone[case] != together[case]]
    assert not different, (
        f"{len(different)} of {len(alone)} results have other bits on {len(cpus)} threads than on one: "
        + "; ".join(different[:5])
    )
