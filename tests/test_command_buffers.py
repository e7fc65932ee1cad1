"""CUDA graphs: XLA captures steps of each form as they are, and a decode loop with the flags of docs/serving.md."""

import checks
import pytest
from programs import report, start_python

LOOPS = "--xla_gpu_graph_min_graph_size=1 --xla_gpu_enable_command_buffer=+WHILE"

# Runs a program with a form of attention a few times with different inputs. Reports which of its operations lie in
# command buffers, and how far each run is from plain JAX, relative to its largest number.
PROGRAM = """
import json, os, pathlib, sys, tempfile

dump = tempfile.mkdtemp()
# The autotuner would take minutes where other processes use the device.
flags = f"{sys.argv[2]} --xla_gpu_autotune_level=0 --xla_dump_to={dump} --xla_dump_hlo_as_text"
os.environ |= {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cuda,cpu"}
import jax, jax.numpy as jnp
import jax_flash

def distance(x, y):
    y = y.astype(jnp.float32)
    return abs(x.astype(jnp.float32) - y).max() / abs(y).max()

form, tokens, heads = sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
rows = jnp.arange(tokens, dtype=jnp.int32)
first = rows // 30 * 30  # of the row's document
options = {
    "causal": dict(causal=True),
    "packed": dict(causal=True),
    "pages": dict(causal=True),
    "segments": dict(causal=True, segment_ids=jnp.broadcast_to(rows // 30, (2, tokens))),
    "ranges": dict(mask=jax_flash.masks.ranges(first[None, None], rows[None, None] + 1)),
    "boolean array": dict(mask=((first[:, None] <= rows) & (rows <= rows[:, None]))[None, None]),
    "blocks": dict(mask=jax_flash.masks.blocks(jnp.arange(-(-tokens // 64))[None, None, :, None], (64, 64))),
}[form]

def attention(implementation):
    def packed(*operands):
        starts = jnp.arange(3, dtype=jnp.int32) * operands[0].shape[1]
        flat = [x.reshape(-1, *x.shape[2:]) for x in operands]
        out = jax_flash.flash_attention_varlen(*flat, starts, implementation=implementation, **options)
        return out.reshape(operands[0].shape)

    def fixed(*operands):
        return jax_flash.flash_attention(*operands, implementation=implementation, **options)

    # Packed sequences of one token: the schedule, decode and a forward that finds no other.
    def pages(q, k, v):
        starts, lengths = jnp.arange(3, dtype=jnp.int32), jnp.array([tokens, 30], jnp.int32)
        tables = jnp.arange(2 * tokens // 16, dtype=jnp.int32).reshape(2, -1)
        pools = [x.reshape(-1, 16, *x.shape[2:]) for x in (k, v)]
        out = jax_flash.paged_attention(
            q[:, 0], *pools, tables, lengths, cu_seqlens_q=starts, implementation=implementation, **options
        )
        return out[:, None]

    return {"packed": packed, "pages": pages}.get(form, fixed)

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

keys_values = normal(8, 2, tokens, heads, 64), normal(9, 2, tokens, heads, 64)
if sys.argv[1] == "step":
    program = step
    weights = [[normal(seed + i, 64, 64) / 8 for i in range(3)] for seed in range(3)]
    inputs = [(w, normal(seed, 2, tokens, heads, 64)) for seed, w in enumerate(weights)]
else:
    program = decode
    inputs = [(normal(seed, 2, 1, heads, 64),) for seed in range(3)]

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


FORMS = ("causal", "packed", "segments", "ranges", "boolean array", "blocks")


# Each of these has more tiles than an H200 has room for at once, so that a counter gives them to CTAs.
@pytest.mark.parametrize(
    ("program", "flags", "form", "tokens", "heads", "calls"),
    [("step", "", "causal", 100, 4, 2)]
    + [("decode", LOOPS, "causal", 100, 4, 1), ("decode", LOOPS, "pages", 1024, 4, 1)]
    + [("step", "", form, 1024, 20, 2) for form in FORMS],
)
def test_every_call_is_captured_and_replayed(program, flags, form, tokens, heads, calls, kernel):
    if kernel != "cuda":
        pytest.skip("CUDA graphs are CUDA's")
    checks.require(kernel, "forward", "backward", dtype="bfloat16", d=64, dv=64)
    found = report(start_python(PROGRAM, program, flags, form, str(tokens), str(heads)))
    assert (found["captured"], found["outside"]) == (calls, 0)
    assert max(found["errors"]) < 0.05  # captured calls read their own inputs: a stale one is off by about 1
