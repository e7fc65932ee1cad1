"""The CPU forward is correct on every instruction set, with the same bits for any number of threads."""

from __future__ import annotations

import pytest
from conftest import IMPLEMENTATION
from programs import assert_same_bits_on_one_thread_and_on_all, report, start_python

pytestmark = pytest.mark.skipif(IMPLEMENTATION != "cpu", reason="promises of the CPU kernels")

ISAS = ("avx512_bf16", "avx512", "avx2", "baseline")
ON_ONE_ISA = """
import json, os, sys
os.environ["JAX_FLASH_CPU_ISA"] = sys.argv[1]
import checks, jax_flash
from cases import Case
from jax_flash import _core
try:
    isa = _core.cpu_isa()
except ValueError as error:  # this machine or this build lacks it
    print(json.dumps(str(error)))
    sys.exit()
tails = Case("tails", b=1, sq=70, sk=530, hq=4, hk=2, d=24, dv=40, causal=True)
window = Case("window", b=1, sq=200, sk=200, hq=2, hk=1, d=64, dv=64, window=(40, 9), sinks=True)
scores = Case("scores", b=2, sq=40, sk=90, hq=2, hk=2, softcap=3.0, bias=(1, 2, 40, 90), alibi_slopes=(2,))
hidden = Case("hidden", b=2, sq=33, sk=97, hq=2, segments=3, mask=(2, 1, 33, 97), dropout_rate=0.2)
few = Case("few", b=2, sq=2, sk=300, hq=4, hk=2, kv_lengths=(300, 17))
for case in (tails, window, scores, hidden, few):
    for dtype in ("float32", "bfloat16", "float16"):
        checks.check(case.replace(dtype=dtype), "cpu")
# float16 denormals are read and written unchanged.
import jax.numpy as jnp
tiny = jnp.asarray([3e-6, -6e-8, 6.1e-5, 5.9e-5, 0, 1e-7, 2e-5, -3e-5], jnp.float16).reshape(1, 1, 1, 8)
out = jax_flash.flash_attention(jnp.zeros_like(tiny), tiny, tiny, implementation="cpu")
assert (out == tiny).all() and (tiny != 0).sum() == 7, out
print(json.dumps(isa))
"""
BITS = """
b, s, d = 1, 1100, 64
for h, hk in ((1, 1), (3, 3), (8, 1)):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(b, s, h, d), (b, s, hk, d), (b, s, hk, d)]
    for dtype in ("float32", "bfloat16"):
        q, k, v = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes))
        ids = jnp.arange(s, dtype=jnp.int32)[None] // 300
        for options in (
            {}, {"causal": True}, {"window": (100, 30)}, {"causal": True, "segment_ids": ids},
            {"softcap": 5.0, "alibi_slopes": jnp.ones(h)},
            {"dropout_rate": 0.2, "dropout_key": jax.random.key(1)},
        ):
            out, lse = jax_flash.flash_attention(q, k, v, return_lse=True, implementation="cpu", **options)
            keep(f"{h} heads, {hk} KV heads, {dtype}, {', '.join(options) or 'plain'}", out=out, lse=lse)
# Here the last block of a tile of 12 or 13 positions is longer than the tile, which sees 512 keys, a tile of them.
shapes = (b, 1000, 5, d), (b, 1356, 1, d), (b, 1356, 1, d)
q, k, v = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
f = lambda q: jax_flash.flash_attention(q, k, v, causal=True, return_lse=True, implementation="cpu")
(out, lse), (tout, tlse) = jax.jvp(f, (q,), (jnp.cos(q),))
keep("5 heads, 1 KV head", out=out, lse=lse, tout=tout, tlse=tlse)
assert len(bits) == 76
"""


@pytest.mark.parametrize("isa", ISAS)
def test_each_instruction_set_keeps_the_contract(isa: str) -> None:
    used = report(start_python(ON_ONE_ISA, isa), timeout=600)
    if used != isa:
        pytest.skip(f"this machine runs {used}, not {isa}")


def test_results_are_the_same_bits_on_one_thread_and_on_all() -> None:
    assert_same_bits_on_one_thread_and_on_all(BITS)
