"""CUDA graphs: XLA captures the calls of a training step and of a decode loop, and replays give the same results.

The flags are those that docs/serving.md and README.md name.
"""

import pytest
from programs import report, start_python

FLAGS = "--xla_gpu_graph_min_graph_size=1 --xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,WHILE"

# Runs a program a few times with other inputs, and tells what lies inside and outside command buffers of it and how
# far every run is from plain JAX.
PROGRAM = """
import json, os, re, sys

os.environ |= {"XLA_FLAGS": sys.argv[2], "JAX_PLATFORMS": "cuda,cpu"}
import jax, jax.numpy as jnp
import jax_flash

def distance(x, y):
    return abs(x.astype(jnp.float32) - y.astype(jnp.float32)).max()

def attention(implementation):
    return lambda q, k, v: jax_flash.flash_attention(q, k, v, causal=True, implementation=implementation)

def step(implementation):
    def loss(weights, x):
        q, k, v = (jnp.einsum("bshd,de->bshe", x, w) for w in weights)
        return (attention(implementation)(q, k, v).astype(jnp.float32) ** 2).sum()
    return lambda weights, x: jax.tree.map(lambda w, g: w - 1e-3 * g, weights, jax.grad(loss)(weights, x))

def decode(implementation):
    def token(_, q):
        return q + attention(implementation)(q, *keys_values)
    return lambda q: jax.lax.fori_loop(0, 4, token, q)

def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)

keys_values = normal(8, 2, 100, 4, 64), normal(9, 2, 100, 4, 64)
if sys.argv[1] == "step":
    program = step
    inputs = [([normal(seed + i, 64, 64) / 8 for i in range(3)], normal(seed, 2, 100, 4, 64)) for seed in range(3)]
else:
    program = decode
    inputs = [(normal(seed, 2, 1, 4, 64),) for seed in range(3)]

compiled = jax.jit(program("cuda")).lower(*inputs[0]).compile()
plain = jax.jit(program("xla"))
errors = []
for arguments in inputs * 3:
    differences = jax.tree.map(distance, compiled(*arguments), plain(*arguments))
    errors.append(float(max(jax.tree.leaves(differences))))

captured, outside, computation = [], [], ""
for line in compiled.as_text().splitlines():
    if line and not line[0].isspace():
        computation = line
    if found := re.search(r'custom_call_target="(jax_flash_\\w+)"', line):
        (captured if "command_buffer" in computation else outside).append(found.group(1))
print(json.dumps({"captured": sorted(captured), "outside": outside, "errors": errors}))
"""


@pytest.mark.parametrize(
    ("program", "calls"),
    [("step", ["jax_flash_backward", "jax_flash_forward"]), ("decode", ["jax_flash_forward"])],
)
def test_every_call_is_captured_and_replayed(program, calls, kernel):
    if kernel != "cuda":
        pytest.skip("CUDA graphs are CUDA's")
    found = report(start_python(PROGRAM, program, FLAGS))
    assert found["captured"] == calls
    assert not found["outside"]
    assert max(found["errors"]) < 0.05  # captured calls read their own inputs: a stale one is off by about 1
