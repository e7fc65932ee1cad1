"""delta = rowsum(dO ∘ O): deterministic CUDA calls add in one order, whatever XLA's autotuning chooses."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from cases import Case, varlen
from jax.sharding import PartitionSpec as P
from meshes import GQA, PACKED, arrays_of, check, make_mesh, qkv
from programs import assert_same, attention, collectives, with_gradients

import jax_flash

PLAIN = Case("plain", b=2, sq=5, sk=7, hq=4, hk=2, d=16, dv=8, causal=True, dtype="bfloat16")
DOCUMENTS = varlen("documents", (700, 3, 500), hq=4, hk=2, d=128, dv=128, causal=True, dtype="bfloat16")


def deltas(call, *arguments):
    """The operands and the result of each custom call for delta, in a program for CUDA."""
    checks = jax_flash.export_checks()
    text = jax.export.export(call, platforms=["cuda"], disabled_checks=checks)(*arguments).mlir_module()
    return re.findall(r"@jax_flash_delta\(.* : \((.*)\) -> (\S+)", text)


def gradients(case, implementation=None, deterministic=True):
    return jax.jit(with_gradients(attention(case, implementation, deterministic=deterministic)))


def pull_back(query, cotangent, implementation=None, deterministic=True):
    x = jnp.ones((2, 7, 2, query.shape[-1]), query.dtype)
    options = {"implementation": implementation, "deterministic": deterministic}
    return jax.vjp(lambda q: jax_flash.flash_attention(q, x, q[:, :7, :2], **options), query)[1](cotangent)[0]


def test_only_deterministic_calls_have_the_kernel(lowers_for_cuda):
    assert deltas(gradients(PLAIN, deterministic=False), arrays_of(PLAIN)) == []
    found = deltas(gradients(PLAIN), arrays_of(PLAIN))
    assert found == [("tensor<2x5x4x8xbf16>, tensor<2x5x4x8xbf16>", "tensor<2x4x5xf32>")]
    packed = deltas(gradients(DOCUMENTS), arrays_of(DOCUMENTS))
    assert packed == [("tensor<1203x4x128xbf16>, tensor<1203x4x128xbf16>", "tensor<4x1203xf32>")]


@pytest.mark.parametrize("mapped", [(0, None), (None, 0), (0, 0)])
def test_the_kernel_gets_all_leading_dimensions(lowers_for_cuda, mapped):
    arrays = [jnp.ones((*[3] * (axis is not None), 2, 7, 4, 8)) for axis in mapped]
    (found,) = deltas(jax.jit(jax.vmap(pull_back, mapped)), *arrays)
    assert found == ("tensor<3x2x7x4x8xf32>, tensor<3x2x7x4x8xf32>", "tensor<3x2x4x7xf32>")


@pytest.mark.parametrize("mapped", [(0, None), (None, 0)])
def test_a_mapped_call_is_right(kernel, mapped):
    keys = jax.random.split(jax.random.key(0))
    arrays = [
        jax.random.normal(key, (*[3] * (axis is not None), 2, 7, 4, 32)) for key, axis in zip(keys, mapped)
    ]
    run = partial(pull_back, implementation=kernel)
    got = jax.jit(jax.vmap(run, mapped))(*arrays)
    for i in range(3):
        one = [x if axis is None else x[i] for x, axis in zip(arrays, mapped)]
        assert_same(got[i], run(*one, deterministic=False))


@pytest.mark.parametrize(
    ("case", "specs"),
    [
        (GQA, qkv(P("data", None, "model"))),
        (GQA.replace(hk=2), qkv(P("data", None, "model"), P("data"))),
        (GQA.replace(sq=8, sk=8), qkv(P(None, "model"))),
        (PACKED, qkv(P(None, "model"))),
    ],
    ids=["batch and heads", "fewer KV heads", "sequence", "packed heads"],
)
def test_a_row_of_a_split_call_is_computed_where_it_lies(kernel, axis_type, case, specs):
    """No more is communicated than without `deterministic`."""
    mesh, arrays = make_mesh(axis_type, axis_type), arrays_of(case)
    texts = [check(attention(case, kernel, deterministic=x), mesh, arrays, specs)[0] for x in (False, True)]
    assert collectives(texts[0]) == collectives(texts[1])


@pytest.mark.parametrize("case", [PLAIN, DOCUMENTS], ids=lambda case: case.name)
def test_autotuning_changes_no_bit(kernel, case):
    if kernel != "cuda":
        pytest.skip("XLA tunes programs for GPUs alone")
    call, arrays = gradients(case, kernel), arrays_of(case)
    programs = [call.lower(arrays).compile({"xla_gpu_autotune_level": level}) for level in (0, 4)]
    one, other = ([x.tobytes() for x in jax.tree.leaves(jax.device_get(f(arrays)))] for f in programs)
    assert one == other
