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

import jax_flash

mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

def in_shard_map(case, **how):
    # ring_attention over all four devices, from and to whole arrays
    axes, zigzag = ("data", "model"), how.get("order") == "zigzag"
    def shard(arrays):
        options = case.options | arrays | {"return_lse": True}
        return jax_flash.ring_attention(axis_name=axes, **options, **how)
    def call(arrays):
        if zigzag:
            arrays = {name: jax_flash.zigzag_permute(x, 4) if x.ndim == 4 else x for name, x in arrays.items()}
        specs = {name: P(None, axes) if x.ndim == 4 else P() for name, x in arrays.items()}
        out_specs = P(None, axes), P(None, None, axes)
        out, lse = jax.shard_map(shard, mesh=mesh, in_specs=(specs,), out_specs=out_specs)(arrays)
        if zigzag:
            out, lse = (jax_flash.zigzag_unpermute(x, 4, axis) for x, axis in ((out, 1), (lse, 2)))
        return out, lse
    return call

def distribute(x, spec):
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: np.asarray(x[index]))

def compare(case, specs, call=None):
    inputs = make_inputs(case)
    arrays = inputs.positional | inputs.keywords
    if "dropout_key" in arrays:
        arrays["dropout_key"] = jax.random.key_data(arrays["dropout_key"])
    arrays = jax.device_get(arrays)
    run = jax.jit(with_gradients(attention(case)))
    split = jax.jit(with_gradients(call)) if call else run
    placed = {name: distribute(x, specs.get(name, P())) for name, x in arrays.items()}
    compiled = split.lower(placed).compile()
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

by_heads = P("data", None, "model")
gqa = Case("gqa", b=4, sq=6, sk=6, hq=4, hk=2, d=8, dv=8, causal=True, dropout_rate=0.2)
packed = BY_NAME["packed"].replace(d=8, dv=8, causal=True)
qkv = ("query", "key", "value")
long, tokens = gqa.replace(sq=16, sk=16), P(None, ("data", "model"))
found = {
    "devices": [len(jax.local_devices()), len(jax.devices())],
    "batch and heads": compare(gqa, dict.fromkeys(qkv, by_heads)),
    "one KV head": compare(gqa.replace(hk=1), {"query": by_heads, "key": P("data"), "value": P("data")}),
    "sequence": compare(gqa, dict.fromkeys(qkv, P(None, "data"))),
    "zigzag": compare(long, dict.fromkeys(qkv, tokens), in_shard_map(long, order="zigzag")),
    "all to all": compare(long, dict.fromkeys(qkv, tokens), in_shard_map(long, mode="all_to_all")),
    "packed": compare(packed, dict.fromkeys(qkv, P(None, "model"))),
}
try:
    jax_flash.check_inputs(kv_lengths=distribute(np.arange(4, dtype=np.int32), P("data")))
except ValueError as error:
    found["check_inputs"] = str(error)
jax.distributed.shutdown()
print(json.dumps(found))
"""


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def test_two_processes_compute_what_one_does():
    """Each process gets its shards of the right results and gradients. Split batch and heads cost no communication; a
    split sequence runs as a ring or by all-to-all."""
    port = free_port()
    processes = [start_python(PROGRAM, str(port), str(index), "2", devices=2) for index in range(2)]
    try:
        outcomes = [report(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for found in outcomes:
        assert found.pop("devices") == [2, 4]
        assert "check_inputs: kv_lengths is split over several processes" in found.pop("check_inputs")
        for name, outcome in found.items():
            assert outcome["distance"] < 1e-4, name
        assert found["batch and heads"]["collectives"] == found["packed"]["collectives"] == {}
        assert found["one KV head"]["collectives"] == {"all-reduce": 1}
        assert set(found["sequence"]["collectives"]) == {"collective-permute"}
        assert set(found["all to all"]["collectives"]) == {"all-to-all"}
