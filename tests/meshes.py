"""What the files about sharding share: cases for eight devices, a mesh, and checks of a sharded program."""

import contextlib

import jax
import jax.numpy as jnp
from cases import BY_NAME, Case, make_inputs, varlen
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import assert_same, require_devices, with_gradients

MHA = Case("mha", b=4, sq=6, sk=6, hq=8, hk=8, d=8, dv=8, causal=True)
GQA = MHA.replace(name="gqa", hk=4)
MQA = MHA.replace(name="mqa", hk=1)
FEW = MHA.replace(name="fewer KV heads than devices", hk=2)
PACKED = varlen("packed", (5, 9), padding=(2, 2), hq=8, hk=4, d=8, dv=8, causal=True)
EVERYTHING = BY_NAME["everything"].replace(
    b=4,
    sq=6,
    sk=10,
    hq=8,
    hk=4,
    d=8,
    dv=8,
    mask=(4, 8, 1, 10),
    bias=(4, 8, 6, 10),
    q_lengths=(6, 2, 5, 0),
    kv_lengths=(10, 7, 3, 8),
    alibi_slopes=(4, 8),
)

BATCH_HEADS = P("data", None, "model")
OPTIONS = {
    "q_lengths": P("data"),
    "kv_lengths": P("data"),
    "segment_ids": P("data"),
    "mask": P("data", "model"),
    "bias": P("data", "model"),
    "alibi_slopes": P("data", "model"),
    "sinks": P("model"),
}


def make_mesh(*axis_types):
    require_devices(8)
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=axis_types)


def arrays_of(case, seed=0):
    inputs = make_inputs(case, seed)
    return inputs.positional | inputs.keywords


def place(mesh, arrays, specs):
    """Each array with its own spec; those not named are replicated."""
    shardings = {name: NamedSharding(mesh, specs.get(name, P())) for name in arrays}
    return {name: jax.device_put(x, shardings[name]) for name, x in arrays.items()}


def qkv(query, key=None, value=None):
    key = query if key is None else key
    return {"query": query, "key": key, "value": key if value is None else value}


def check(call, mesh, arrays, specs):
    """Runs call and its gradients on sharded arrays and compares with one device. Returns (program's text, results)."""
    return check_run(with_gradients(call), mesh, arrays, specs)


def forward(call, mesh, arrays, specs):
    return check_run(call, mesh, arrays, specs)[0]


def check_run(function, mesh, arrays, specs, tolerance=1e-5):
    """Runs a function on sharded arrays, and compares with one device. Returns (program's text, results)."""
    run = jax.jit(function)
    placed = place(mesh, arrays, specs)
    with within(mesh):
        compiled = run.lower(placed).compile()
        got = compiled(placed)
    assert_same(jax.device_get(got), jax.device_get(run(arrays)), tolerance=tolerance)
    return compiled.as_text(), got


def within(mesh):
    """The context of a mesh with explicit axes, as a user of these sets it."""
    return jax.set_mesh(mesh) if AxisType.Explicit in mesh.axis_types else contextlib.nullcontext()


def stack(case, count):
    return jax.tree.map(lambda *xs: jnp.stack(xs), *(arrays_of(case, seed) for seed in range(count)))
