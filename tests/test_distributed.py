"""Several processes: attention over a mesh that spans them is one process's attention."""

import socket

from programs import report, start_python

# One process of `count`, each with two devices: forward and backward over the global mesh, compared with the
# same computation on one of its own devices.
PROGRAM = """
import json, sys

import jax

port, index, count = map(int, sys.argv[1:])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", count, index)

import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from cases import BY_NAME, Case, make_inputs
from programs import attention, collectives, with_gradients

mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

def distribute(x, spec):
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: np.asarray(x[index]))

def compare(case, specs):
    inputs = make_inputs(case)
    arrays = inputs.positional | inputs.keywords
    if "dropout_key" in arrays:
        arrays["dropout_key"] = jax.random.key_data(arrays["dropout_key"])
    arrays = jax.device_get(arrays)
    run = jax.jit(with_gradients(attention(case)))
    placed = {name: distribute(x, specs.get(name, P())) for name, x in arrays.items()}
    compiled = run.lower(placed).compile()
    got = compiled(placed)
    local = jax.device_put(arrays, jax.local_devices()[0])
    wanted = jax.device_get(run(local))
    distance = 0.0
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        for shard in x.addressable_shards:
            a, b = np.asarray(shard.data), y[shard.index]
            assert a.dtype == b.dtype and (np.isfinite(a) == np.isfinite(b)).all()
            distance = max(distance, float(np.abs(a - b, where=np.isfinite(b), out=np.zeros_like(b)).max()))
    return {"distance": distance, "collectives": collectives(compiled.as_text())}

split = P("data", None, "model")
gqa = Case("gqa", b=4, sq=6, sk=6, hq=4, hk=2, d=8, dv=8, causal=True, dropout_rate=0.2)
packed = BY_NAME["packed"].replace(d=8, dv=8, causal=True)
qkv = ("query", "key", "value")
found = {
    "devices": [len(jax.local_devices()), len(jax.devices())],
    "batch and heads": compare(gqa, dict.fromkeys(qkv, split)),
    "one KV head": compare(gqa.replace(hk=1), {"query": split, "key": P("data"), "value": P("data")}),
    "sequence": compare(gqa, dict.fromkeys(qkv, P(None, "data"))),
    "packed": compare(packed, dict.fromkeys(qkv, P(None, "model"))),
}
jax.distributed.shutdown()
print(json.dumps(found))
"""


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def test_two_processes_compute_what_one_does():
    """Each gets its shards of the right results and gradients; batch and heads cost no communication."""
    port = free_port()
    processes = [start_python(PROGRAM, str(port), str(index), "2", devices=2) for index in range(2)]
    try:
        outcomes = [report(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for found in outcomes:
        assert found.pop("devices") == [2, 4]
        for name, outcome in found.items():
            assert outcome["distance"] < 1e-4, name
        assert found["batch and heads"]["collectives"] == found["packed"]["collectives"] == {}
        assert found["one KV head"]["collectives"] == {"all-reduce": 1}
