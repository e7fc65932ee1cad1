"""Programs made in one process run in another that does no more than import jax_flash; the import starts no backend."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BY_NAME, make_inputs
from jax.experimental.serialize_executable import serialize
from jax.export import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import attention, report, require_devices, start_python, with_gradients

import jax_flash

CASE = BY_NAME["everything"].replace(b=2, hq=4, hk=2, d=16, dv=16, alibi_slopes=(2, 4))
CHECKS = jax_flash.export_checks()

# Reads a program, its arguments and the expected results, and reports how far the program's results are from them.
READER = """
import json, pickle, sys
from pathlib import Path

import jax
import jax_flash

folder, kind, cache = sys.argv[1:]
if cache:
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("/cache_hits") else None)

arrays, wanted = pickle.loads((Path(folder) / "arrays").read_bytes())
program = (Path(folder) / "program").read_bytes()
if kind == "export":
    run = jax.jit(jax.export.deserialize(bytearray(program)).call)
elif kind == "gradients of an export":
    call = jax.export.deserialize(bytearray(program)).call
    run = jax.jit(lambda *x: jax.vjp(call, *x)[1](call(*x)))
else:
    from jax.experimental.serialize_executable import deserialize_and_load
    payload, *trees, devices = pickle.loads(program)
    run = deserialize_and_load(payload, *trees, execution_devices=jax.devices()[:devices])
    arrays = jax.device_put(arrays, run.input_shardings[0][0])

got = run(*arrays) if isinstance(arrays, tuple) else run(arrays)
far = [abs(jax.device_get(a).astype("float32") - b.astype("float32")) for a, b in zip(jax.tree.leaves(got), wanted)]
print(json.dumps({"hits": len(hits), "distance": max(float(x[x == x].max(initial=0)) for x in far)}))
"""

IMPORT = """
import json
import jax
import jax_flash
from jax._src import xla_bridge

started = len(xla_bridge._backends)
jax.config.update("jax_num_cpu_devices", 3)
print(json.dumps({"started": started, "devices": jax.device_count("cpu")}))
"""


def arrays_of(case):
    inputs = make_inputs(case)
    arrays = inputs.positional | inputs.keywords
    return arrays | {"dropout_key": jax.random.key_data(arrays["dropout_key"])}  # typed keys do not serialize


def write(folder, program, arrays, wanted):
    (folder / "program").write_bytes(program)
    (folder / "arrays").write_bytes(pickle.dumps(jax.device_get((arrays, jax.tree.leaves(wanted)))))


def read(folder, kind, kernel, cache=""):
    process = start_python(READER, str(folder), kind, str(cache), devices=8, platform=kernel)
    found = report(process)
    assert found["distance"] < 1e-4
    return found


def test_the_import_registers_without_starting_a_backend():
    """So options that must be set before the first device, such as the number of CPU devices, may follow the import."""
    assert report(start_python(IMPORT)) == {"started": 0, "devices": 3}


def test_an_exported_program(kernel, tmp_path):
    """Forward and backward, in a process that compiles the program and in one that finds it in the persistent cache."""
    call, arrays = jax.jit(with_gradients(attention(CASE, kernel))), arrays_of(CASE)
    made = export(call, platforms=[kernel], disabled_checks=CHECKS)(arrays)
    write(tmp_path, made.serialize(), arrays, call(arrays))
    assert read(tmp_path, "export", kernel, tmp_path / "cache")["hits"] == 0
    assert read(tmp_path, "export", kernel, tmp_path / "cache")["hits"] > 0


def test_the_gradients_of_an_exported_program(kernel, tmp_path):
    arrays = tuple(arrays_of(CASE)[name] for name in ("query", "key", "value"))

    @jax.jit
    def call(query, key, value):
        return jax_flash.flash_attention(query, key, value, causal=True, implementation=kernel)

    made = export(call, platforms=[kernel], disabled_checks=CHECKS)(*arrays)
    wanted = jax.vjp(call, *arrays)[1](call(*arrays))
    write(tmp_path, made.serialize(vjp_order=1), arrays, wanted)
    read(tmp_path, "gradients of an export", kernel)


def test_an_exported_append(kernel, tmp_path):
    k_pages, v_pages = jnp.ones((4, 8, 2, 16)), jnp.zeros((4, 8, 2, 16))
    key, value = jnp.full((2, 3, 2, 16), 5.0), jnp.full((2, 3, 2, 16), 7.0)
    tables, lengths = np.array([[1], [3]], np.int32), np.array([2, 5], np.int32)

    @jax.jit
    def call(*arrays):
        return jax_flash.append_kv(*arrays, block_tables=tables, kv_lengths=lengths, implementation=kernel)

    arrays = (k_pages, v_pages, key, value)
    made = export(call, platforms=[kernel], disabled_checks=CHECKS)(*arrays)
    write(tmp_path, made.serialize(), arrays, call(*arrays))
    read(tmp_path, "export", kernel)


@pytest.mark.parametrize("devices", [1, 4])
def test_a_compiled_program(kernel, tmp_path, devices):
    """On one device, and partitioned over four: running it does not need the partitioner any more."""
    require_devices(devices)
    mesh = jax.make_mesh((devices,), ("model",), devices=jax.devices()[:devices], axis_types=(AxisType.Auto,))
    arrays = arrays_of(CASE)
    split = {name: NamedSharding(mesh, P(None, None, "model")) for name in ("query", "dout")}
    shardings = {name: split.get(name, NamedSharding(mesh, P())) for name in arrays}
    call = jax.jit(with_gradients(attention(CASE, kernel)), in_shardings=(shardings,))
    compiled = call.lower(arrays).compile()
    wanted = compiled(jax.device_put(arrays, shardings))
    write(tmp_path, pickle.dumps((*serialize(compiled), devices)), arrays, wanted)
    read(tmp_path, "compiled", kernel)
