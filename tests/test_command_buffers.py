"""CUDA graphs: XLA captures a training step as it is, and a decode loop with the flags that docs/serving.md names."""

import checks
import pytest
from programs import report, start_python

LOOPS = "--xla_gpu_graph_min_graph_size=1 --xla_gpu_enable_command_buffer=+WHILE"

# Runs a program a few times with different inputs. Reports which of its operations lie in command buffers, and how
# far each run is from plain JAX.
PROGRAM = """
import json, os, pathlib, sys, tempfile

dump = tempfile.mkdtemp()
flags = f"{sys.argv[2]} --xla_dump_to={dump} --xla_dump_hlo_as_text"
os.environ |= {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cuda,cpu"}
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

call = program("cuda")
call.__name__ = program.__name__
compiled = jax.jit(call).lower(*inputs[0]).compile()
plain = jax.jit(program("xla"))
errors = []
for arguments in inputs * 3:
    differences = jax.tree.map(distance, compiled(*arguments), plain(*arguments))
    errors.append(float(max(jax.tree.leaves(differences))))

captured = outside = 0
[sequence] = pathlib.Path(dump).glob(f"*jit_{program.__name__}.thunk_sequence_after_thunk_passes.txt")
buffer = None  # the indentation of the command buffer that a line may lie in
for line in sequence.read_text().splitlines():
    if ": k" not in line:
        continue  # "condition:", "body:"
    indentation = len(line) - len(line.lstrip())
    if buffer is not None and indentation <= buffer:
        buffer = None
    if "kCommandBuffer" in line:
        buffer = indentation
    if "kCustomCall" in line:
        captured += buffer is not None
        outside += buffer is None
print(json.dumps({"captured": captured, "outside": outside, "errors": errors}))
"""


@pytest.mark.parametrize(("program", "flags", "calls"), [("step", "", 2), ("decode", LOOPS, 1)])
def test_every_call_is_captured_and_replayed(program, flags, calls, kernel):
    if kernel != "cuda":
        pytest.skip("CUDA graphs are CUDA's")
    checks.require(kernel, "forward", "backward", dtype="bfloat16", d=64, dv=64)
    found = report(start_python(PROGRAM, program, flags))
    assert (found["captured"], found["outside"]) == (calls, 0)
    assert max(found["errors"]) < 0.05  # captured calls read their own inputs: a stale one is off by about 1
