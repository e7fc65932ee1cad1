"""jax.export: programs for platforms that are not here, for shapes not yet known, for several devices."""

import re

import checks
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import BY_NAME, Case, make_inputs, varlen
from jax.export import deserialize, export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import assert_same, attention, require_devices, with_gradients

from jax_flash import (
    append_kv,
    export_checks,
    flash_attention,
    flash_attention_varlen,
    masks,
    paged_attention,
)
from jax_flash.backends import extension

PLAIN = Case("plain", b=2, sq=5, sk=7, hq=4, hk=2, d=16, dv=16, causal=True, dtype="bfloat16")
EVERYTHING = BY_NAME["everything"].replace(dtype="bfloat16", d=16, dv=16)
PASSES = ("forward", "backward", "bias_gradient")
CHECKS = export_checks()


def arrays_of(case, seed=0):
    inputs = make_inputs(case, seed)
    return inputs.positional | inputs.keywords


def exported(call, arrays, *platforms):
    """call exported, serialized and read back."""
    made = export(jax.jit(call), platforms=platforms, disabled_checks=CHECKS)(arrays)
    return deserialize(made.serialize(vjp_order=0))


def test_the_checks_name_every_custom_call_of_the_extension_and_that_of_cuda_alone():
    core, _ = extension()
    assert core is not None
    assert {check.is_custom_call() for check in export_checks()} == {*core.registrations(), "jax_flash_delta"}


def test_a_step_of_serving_and_its_tangent_export_with_the_same_checks(kernel):
    """append_kv and forward mode are the calls that training does not have."""
    x, pool = jnp.ones((2, 3, 2, 8)), jnp.ones((4, 4, 2, 8))

    def step(x, pool):
        pools = append_kv(pool, pool, x, x, [[0], [1]], 0, implementation=kernel)[:2]
        return pools, jax.jvp(lambda q: flash_attention(q, x, x, implementation=kernel), (x,), (x,))

    with pytest.raises(ValueError, match="custom call"):
        export(jax.jit(step))(x, pool)
    made = export(jax.jit(step), disabled_checks=export_checks())(x, pool)
    assert_same(deserialize(made.serialize()).call(x, pool), jax.jit(step)(x, pool))


# for a platform that is not here


def test_a_machine_without_a_gpu_exports_for_cuda(lowers_for_cuda):
    """The program holds the custom call by name, with the call's options as its attributes."""
    case = PLAIN.replace(softcap=7.5, window=(3, None), scale=0.25)
    program = exported(attention(case), arrays_of(case), "cuda")
    assert program.platforms == ("cuda",)
    text = program.mlir_module()
    assert text.count("@jax_flash_forward(") == 1
    (attributes,) = re.findall(r"spec = \{(.*?)\}", text)
    found = dict(item.split(" = ") for item in attributes.split(", "))
    assert found["left"] == "3 : i32"
    assert found["right"] == "0 : i32"
    assert found["softcap"] == "7.500000e+00 : f32"
    assert found["scale"] == "2.500000e-01 : f32"
    assert found["deterministic"] == "false"


def test_the_backward_for_cuda_has_all_passes(lowers_for_cuda):
    text = exported(with_gradients(attention(EVERYTHING)), arrays_of(EVERYTHING), "cuda").mlir_module()
    assert [text.count(f"@jax_flash_{name}(") for name in PASSES] == [1, 1, 1]


def test_head_dims_that_are_no_multiple_of_8_are_padded_for_cuda(lowers_for_cuda):
    case = PLAIN.replace(d=13, dv=7)
    text = exported(attention(case), arrays_of(case), "cuda").mlir_module()
    (call,) = re.findall(r"@jax_flash_forward\(.*", text)
    assert "tensor<2x5x4x16xbf16>, tensor<2x7x2x16xbf16>, tensor<2x7x2x8xbf16>" in call
    assert "stablehlo.pad" in text


@pytest.mark.parametrize(("bias", "columns"), [((1, 4, 5, 7), 8), ((2, 1, 1, 7), 8), ((2, 4, 5, 1), 1)])
def test_rows_of_a_bias_are_padded_to_multiples_of_8_for_cuda(lowers_for_cuda, bias, columns):
    case = PLAIN.replace(bias=bias, bias_dtype="bfloat16")
    arrays = arrays_of(case)
    text = exported(with_gradients(attention(case)), arrays, "cuda").mlir_module()
    calls = re.findall(r"@jax_flash_(forward|backward|bias_gradient)\(.*: \((.*)\) ->", text)
    assert len(calls) == (2 if columns == 1 else 3)  # a bias of one column has no gradient
    padded = "x".join(map(str, (*bias[:3], columns)))
    assert all(f"tensor<{padded}xbf16>" in operands for _, operands in calls)


def test_a_platform_without_a_custom_call_raises_and_names_xla():
    with pytest.raises(
        NotImplementedError, match='no custom call for platform "tpu"; use implementation="xla"'
    ):
        exported(attention(PLAIN), arrays_of(PLAIN), "tpu")
    exported(attention(PLAIN, "xla"), arrays_of(PLAIN), "tpu")


def test_an_implementation_of_another_platform_raises():
    with pytest.raises(NotImplementedError, match='implementation="cpu" cannot run on platform "cuda"'):
        exported(attention(PLAIN, "cpu"), arrays_of(PLAIN), "cuda")


# for this platform


@pytest.mark.parametrize("case", [EVERYTHING, BY_NAME["packed everything"]], ids=["fixed", "varlen"])
def test_a_program_read_back_computes_the_same(kernel, case):
    call, arrays = with_gradients(attention(case, kernel)), arrays_of(case)
    arrays["dropout_key"] = jax.random.key_data(arrays["dropout_key"])  # typed keys do not serialize
    assert_same(exported(call, arrays, kernel).call(arrays), jax.jit(call)(arrays))


def test_a_program_for_two_platforms_runs_on_this_one(kernel, lowers_for_cuda):
    call, arrays = with_gradients(attention(PLAIN)), arrays_of(PLAIN)
    program = exported(call, arrays, "cpu", "cuda")
    assert program.platforms == ("cpu", "cuda")
    assert_same(program.call(arrays), jax.jit(call)(arrays))


def test_a_program_read_back_is_differentiable(kernel):
    """The backward pass is serialized with it."""
    inputs = make_inputs(PLAIN)
    inputs = checks.with_arrays(inputs, dlse=jnp.zeros_like(inputs.dlse))
    arrays = inputs.positional

    def call(query, key, value):
        return flash_attention(query, key, value, causal=True, implementation=kernel)

    made = export(jax.jit(call), platforms=[kernel], disabled_checks=CHECKS)(*arrays.values())
    read = deserialize(made.serialize(vjp_order=1))
    _, pullback = jax.vjp(read.call, *arrays.values())
    right, low = oracle.references(PLAIN, inputs)
    for name, got in zip(arrays, pullback(inputs.dout), strict=True):
        oracle.assert_gradient(name, np.asarray(got), right.gradients[name], low.gradients[name])


# for shapes not yet known


def with_symbols(arrays, shapes):
    """The arrays' dtypes with symbolic shapes, e.g. query="b, s, 4, 16"."""
    names = list(arrays)
    symbolic = jax.export.symbolic_args_specs([arrays[n] for n in names], [shapes.get(n) for n in names])
    return dict(zip(names, symbolic, strict=True))


FIXED_SYMBOLS = {
    "query": "b, s, 4, 16",
    "key": "b, t, 2, 16",
    "value": "b, t, 2, 16",
    "q_lengths": "b",
    "kv_lengths": "b",
    "bias": "b, 1, s, t",
    "mask": "1, 4, 1, t",
    "alibi_slopes": "b, 4",
}


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_symbolic_batch_and_sequence(kernel, platform, request):
    """One program for every batch size and length, forward and backward."""
    if platform == "cuda":
        request.getfixturevalue("lowers_for_cuda")
    elif kernel != platform:
        pytest.skip(f"runs {kernel}")
    options = {"mask": (1, 4, 1, 5), "bias": (2, 1, 3, 5), "alibi_slopes": (2, 4), "sinks": True}
    case = PLAIN.replace(sq=3, sk=5, **options, q_lengths=(2, 3), kv_lengths=(4, 5))
    call = with_gradients(attention(case))
    program = exported(call, with_symbols(arrays_of(case), FIXED_SYMBOLS), platform)
    if platform == "cuda":
        assert program.mlir_module().count("@jax_flash_backward(") == 1
        return
    wider = case.replace(
        b=3,
        sq=9,
        sk=4,
        bias=(3, 1, 9, 4),
        mask=(1, 4, 1, 4),
        alibi_slopes=(3, 4),
        q_lengths=(9, 0, 4),
        kv_lengths=(4, 4, 2),
    )
    for size in (case, wider):
        arrays = arrays_of(size)
        assert_same(program.call(arrays), jax.jit(call)(arrays))


VARLEN_SYMBOLS = {
    "query": "t, 4, 16",
    "key": "u, 2, 16",
    "value": "u, 2, 16",
    "cu_seqlens_q": "n + 1",
    "cu_seqlens_k": "n + 1",
    "kv_lengths": "n",
}


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_symbolic_tokens_and_sequences(kernel, platform, request):
    if platform == "cuda":
        request.getfixturevalue("lowers_for_cuda")
    elif kernel != platform:
        pytest.skip(f"runs {kernel}")
    case = varlen("packed", (5, 3), d=16, dv=16, kv_lengths=(4, 3), causal=True)
    call = with_gradients(attention(case))
    program = exported(call, with_symbols(arrays_of(case), VARLEN_SYMBOLS), platform)
    if platform == "cuda":
        assert program.mlir_module().count("@jax_flash_backward(") == 1
        return
    for size in (case, case.replace(q_sequences=(7, 0, 2), kv_lengths=(3, 2, 1), padding=(1, 3))):
        arrays = arrays_of(size)
        assert_same(program.call(arrays), jax.jit(call)(arrays))


def test_symbolic_sequences_with_a_mask_and_with_pages(kernel):
    """What a packed token belongs to is found for any number of sequences."""

    def call(x):
        q, kv, cu, tables = x["q"], x["kv"], x["cu"], x["tables"]
        mask, options = masks.chunked(3), {"implementation": kernel}
        pools = append_kv(x["pages"], x["pages"], kv, kv, tables, 0, cu_seqlens=cu, **options)
        paged = paged_attention(q, *pools[:2], tables, pools[2], cu_seqlens_q=cu, mask=mask, **options)
        return paged, flash_attention_varlen(q, kv, kv, cu, mask=mask, **options)

    def arrays(offsets):
        n, t = len(offsets) - 1, offsets[-1] + 1  # one token is padding
        q, kv = (jax.random.normal(jax.random.key(h), (t, h, 16)) for h in (4, 2))
        tables = jnp.arange(2 * n, dtype=jnp.int32).reshape(n, 2)
        return dict(
            q=q, kv=kv, cu=jnp.array(offsets, jnp.int32), tables=tables, pages=jnp.zeros((9, 4, 2, 16))
        )

    symbols = {"q": "t, 4, 16", "kv": "t, 2, 16", "cu": "n + 1", "tables": "n, 2"}
    program = exported(call, with_symbols(arrays([0, 3, 8]), symbols), kernel)
    given = arrays([0, 0, 5, 5, 7])
    assert_same(program.call(given), jax.jit(call)(given))


def test_symbolic_sizes_with_chosen_blocks(kernel):
    def call(x):
        return flash_attention(
            x["q"], x["kv"], x["kv"], mask=masks.blocks(x["chosen"], (16, 16)), implementation=kernel
        )

    def arrays(b, blocks):
        q, kv = (jax.random.normal(jax.random.key(h), (b, 16 * blocks, h, 16)) for h in (4, 2))
        chosen = jax.random.randint(jax.random.key(2), (b, 2, blocks, 2), -1, blocks, jnp.int32)
        return {"q": q, "kv": kv, "chosen": chosen}

    symbols = {"q": "b, 16*s, 4, 16", "kv": "b, 16*s, 2, 16", "chosen": "b, 2, s, 2"}
    program = exported(call, with_symbols(arrays(2, 3), symbols), kernel)
    for sizes in ((1, 2), (3, 4)):
        given = arrays(*sizes)
        assert_same(program.call(given), jax.jit(call)(given))


def test_symbolic_sizes_that_might_differ_raise(kernel):
    arrays = {name: x for name, x in arrays_of(PLAIN).items() if name in ("query", "key", "value")}
    shapes = {"query": "b, s, 4, 16", "key": "c, t, 2, 16", "value": "c, t, 2, 16"}
    with pytest.raises(ValueError, match="key has batch size c, which differs from query's b"):
        exported(attention(PLAIN), with_symbols(arrays, shapes), kernel)


# for several devices

SHARDED = P("data", None, "model")


@pytest.fixture
def mesh():
    require_devices(4)
    return jax.make_mesh(
        (2, 2), ("data", "model"), devices=jax.devices()[:4], axis_types=(AxisType.Auto,) * 2
    )


def test_several_devices_export_inside_shard_map(kernel, mesh):
    call = with_gradients(lambda arrays: mapped(arrays)[0])
    mapped = jax.shard_map(
        attention(PLAIN, kernel), mesh=mesh, in_specs=P(*SHARDED), out_specs=(SHARDED, P("data", "model"))
    )
    sharding = NamedSharding(mesh, SHARDED)
    arrays = {name: jax.device_put(x, sharding) for name, x in arrays_of(PLAIN).items()}
    made = export(jax.jit(call), platforms=[kernel], disabled_checks=CHECKS)(arrays)
    program = deserialize(made.serialize())
    assert program.nr_devices == 4
    assert_same(jax.jit(program.call)(arrays), jax.jit(call)(arrays_of(PLAIN)))


@pytest.mark.parametrize("case", [PLAIN, PLAIN.replace(d=13, dv=7)], ids=["plain", "odd head dims"])
def test_several_devices_of_a_platform_that_is_not_here(lowers_for_cuda, mesh, case):
    mapped = jax.shard_map(
        attention(case),
        mesh=mesh,
        in_specs=P(*SHARDED),
        out_specs=(SHARDED, P("data", "model")),
        check_vma=True,
    )
    sharding = NamedSharding(mesh, SHARDED)
    arrays = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for name, x in arrays_of(case).items()
    }
    program = exported(with_gradients(mapped), arrays, "cuda")
    assert program.nr_devices == 4
    assert [program.mlir_module().count(f"@jax_flash_{name}(") for name in PASSES] == [1, 1, 0]


def test_several_devices_elsewhere_raise_and_name_shard_map(kernel, mesh):
    sharding = NamedSharding(mesh, SHARDED)
    arrays = {name: jax.device_put(x, sharding) for name, x in arrays_of(PLAIN).items()}
    with pytest.raises(NotImplementedError, match=r"exported only with attention inside jax\.shard_map"):
        export(jax.jit(attention(PLAIN, kernel)), disabled_checks=CHECKS)(arrays)
