"""jit, grad, vmap, scan, jax.checkpoint and the others: attention is an ordinary function of JAX."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BY_NAME, Case, make_inputs, varlen
from programs import assert_same, attention, custom_calls, with_gradients

from jax_flash import flash_attention

PLAIN = Case("plain", b=2, sq=5, sk=7, hq=4, hk=2, d=8, dv=8, causal=True)
BIASED = PLAIN.replace(bias=(1, 4, 5, 7), sinks=True)
FIXED = BY_NAME["everything"].replace(sq=5, sk=9, d=8, dv=8, mask=(1, 4, 1, 9), bias=(2, 1, 5, 9), b=2)
FIXED = FIXED.replace(q_lengths=(5, 3), kv_lengths=(6, 9))
VARLEN = BY_NAME["packed everything"].replace(d=8, dv=8, sinks="token")


def arrays_of(case, seed=0):
    inputs = make_inputs(case, seed)
    return inputs.positional | inputs.keywords


# jit and grad


@pytest.mark.parametrize("case", [FIXED, VARLEN], ids=lambda case: case.layout)
def test_jit_changes_nothing(kernel, case):
    run = with_gradients(attention(case, kernel))
    assert_same(jax.jit(run)(arrays_of(case)), run(arrays_of(case)))


def test_value_and_grad_returns_the_value_of_the_call(kernel):
    arrays = arrays_of(PLAIN)

    def loss(query):
        return flash_attention(query, arrays["key"], arrays["value"], implementation=kernel).sum()

    value, gradient = jax.value_and_grad(loss)(arrays["query"])
    assert_same(value, loss(arrays["query"]))
    assert_same(gradient, jax.grad(loss)(arrays["query"]))
    assert gradient.shape == arrays["query"].shape


@pytest.mark.parametrize("used", ["out", "lse"])
def test_the_cotangents_of_out_and_lse_flow_alone(kernel, used):
    """A loss of one of the two results; the cotangent of the other is a symbolic zero."""

    def run(implementation):
        call = attention(BIASED, implementation)
        index = ("out", "lse").index(used)
        return jax.jit(with_gradients(lambda arrays: call(arrays)[index]))(arrays_of(BIASED))

    got = run(kernel)
    assert_same(got, run("xla"), tolerance=1e-4)
    assert np.any(got["gradients"]["sinks"] != 0)
    assert np.any(got["gradients"]["value"] != 0) == (used == "out")


def test_jacrev_stacks_the_gradients_of_every_output(kernel):
    arrays = arrays_of(PLAIN.replace(b=1, sq=2))

    def call(query, implementation):
        return flash_attention(query, arrays["key"], arrays["value"], implementation=implementation).sum(
            (0, 2)
        )

    got, wanted = (
        jax.jit(jax.jacrev(partial(call, implementation=i)))(arrays["query"]) for i in (kernel, "xla")
    )
    assert_same(got, wanted, tolerance=1e-4)


def test_an_unused_bias_gradient_costs_nothing(kernel):
    """Dead code elimination removes its pass. If the gradient is used, its pass is one more call."""
    run = with_gradients(attention(BIASED, kernel))

    def without(arrays):
        gradients = run(arrays)["gradients"]
        return [gradients[name] for name in ("query", "key", "value", "sinks")]

    def calls(function):
        return custom_calls(jax.jit(function).lower(arrays_of(BIASED)).compile().as_text())

    assert calls(without) == {"forward": 1, "backward": 1}
    assert calls(run) == {"forward": 1, "backward": 1, "bias_gradient": 1}
    assert calls(attention(BIASED, kernel)) == {"forward": 1}


def test_eval_shape_needs_no_devices_work(kernel):
    shapes = jax.eval_shape(with_gradients(attention(FIXED, kernel)), arrays_of(FIXED))
    out, lse = shapes["results"]
    assert (out.shape, out.dtype) == ((2, 5, 4, 8), jnp.float32)
    assert (lse.shape, lse.dtype) == ((2, 4, 5), jnp.float32)
    assert shapes["gradients"]["bias"].shape == (2, 1, 5, 9)
    assert not out.weak_type


def test_16_bit_results_keep_their_dtype_and_lse_is_float32(kernel):
    shapes = jax.eval_shape(
        with_gradients(attention(PLAIN, kernel)), arrays_of(PLAIN.replace(dtype="bfloat16"))
    )
    assert [x.dtype.name for x in shapes["results"]] == ["bfloat16", "float32"]
    assert {x.dtype.name for x in shapes["gradients"].values()} == {"bfloat16"}


def test_a_second_call_of_the_same_shapes_is_not_traced_again(kernel):
    traces = []

    @jax.jit
    def call(query, key, value):
        traces.append(query)
        return flash_attention(query, key, value, causal=True, implementation=kernel)

    for seed in range(3):
        call(**arrays_of(PLAIN, seed))
    assert len(traces) == 1


def test_a_donated_query_is_consumed_and_the_result_right(kernel):
    arrays = arrays_of(PLAIN)
    wanted = attention(PLAIN, kernel)(arrays)[0]
    query = jnp.copy(arrays["query"])
    donating = jax.jit(
        lambda q, k, v: flash_attention(q, k, v, causal=True, implementation=kernel), donate_argnums=0
    )
    got = donating(query, arrays["key"], arrays["value"])
    assert query.is_deleted()
    assert_same(got, wanted)


# vmap

FIXED_MAPPED = [
    *((name,) for name in arrays_of(FIXED)),
    ("key", "value"),
    ("query", "bias"),
    ("q_lengths", "kv_lengths"),
    ("query", "key", "value"),
    ("mask", "segment_ids", "dropout_key"),
    tuple(arrays_of(FIXED)),
]
VARLEN_MAPPED = [
    *((name,) for name in arrays_of(VARLEN)),
    ("key", "value"),
    ("cu_seqlens_q", "cu_seqlens_k"),
    ("query", "key", "value", "cu_seqlens_q", "cu_seqlens_k"),
    tuple(arrays_of(VARLEN)),
]
MAPPED = [(FIXED, names) for names in FIXED_MAPPED] + [(VARLEN, names) for names in VARLEN_MAPPED]


def entries(case, count=3):
    """Several inputs of a case that differ in every argument, lengths and offsets included."""
    seeded = [arrays_of(case, seed) for seed in range(count)]
    for i, arrays in enumerate(seeded):
        for name in ("q_lengths", "kv_lengths", "cu_seqlens_q", "cu_seqlens_k"):
            if name in arrays:
                arrays[name] = jnp.maximum(arrays[name] - i, 0)
    return seeded


def stack(trees):
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def row(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def axes(names, arrays):
    return {name: 0 if name in names else None for name in arrays}


@pytest.mark.parametrize(
    ("case", "names"), MAPPED, ids=lambda x: x.layout if isinstance(x, Case) else "+".join(x)
)
def test_vmap_is_a_loop_over_the_mapped_arguments(kernel, case, names):
    """Compares results and gradients with a loop, for mapped and shared arguments of each kind."""
    each = entries(case)
    mapped = {name: stack([arrays[name] for arrays in each]) for name in names}
    one = jax.jit(with_gradients(attention(case, kernel)))
    wanted = stack([one(each[0] | row(mapped, i)) for i in range(len(each))])
    arrays = each[0] | mapped
    got = jax.jit(jax.vmap(with_gradients(attention(case, kernel)), in_axes=(axes(names, arrays),)))(arrays)
    assert_same(got, wanted)


@pytest.mark.parametrize("case", [FIXED, VARLEN], ids=lambda case: case.layout)
def test_the_gradient_of_vmap_sums_over_the_entries_that_share_an_argument(kernel, case):
    each = entries(case)
    shared = {name: each[0][name] for name in ("key", "value", "bias", "sinks") if name in each[0]}
    arrays = stack(each) | shared
    names = [name for name in arrays if name not in shared]
    mapped = jax.vmap(attention(case, kernel), in_axes=(axes(names, arrays),))
    got = jax.jit(with_gradients(mapped))(arrays)

    def loop(arrays):
        return stack(
            [
                attention(case, kernel)({n: x if n in shared else row(x, i) for n, x in arrays.items()})
                for i in range(3)
            ]
        )

    assert_same(got, jax.jit(with_gradients(loop))(arrays))


def test_vmap_takes_any_axis_in_and_out(kernel):
    arrays = stack(entries(PLAIN))
    wanted = jax.vmap(attention(PLAIN, kernel))(arrays)
    moved = {"query": (0, 3), "key": (0, 1), "value": (0, 4)}
    got_axes = {name: to for name, (_, to) in moved.items()}
    moved = {name: jnp.moveaxis(x, *moved[name]) for name, x in arrays.items()}
    got = jax.jit(jax.vmap(attention(PLAIN, kernel), in_axes=(got_axes,), out_axes=(2, -1)))(moved)
    assert_same((jnp.moveaxis(got[0], 2, 0), jnp.moveaxis(got[1], -1, 0)), wanted)


def test_nested_vmaps_map_different_arguments(kernel):
    """Outer: query and bias; inner: key and value. Every pair is a call of its own."""
    each = entries(BIASED)
    outer, inner = ("query", "bias"), ("key", "value")
    arrays = each[0] | {name: stack([a[name] for a in each]) for name in (*outer, *inner)}
    one = with_gradients(attention(BIASED, kernel))
    got = jax.jit(jax.vmap(jax.vmap(one, (axes(inner, arrays),)), (axes(outer, arrays),)))(arrays)
    pairs = [
        [
            each[0] | row({n: arrays[n] for n in outer}, i) | row({n: arrays[n] for n in inner}, j)
            for j in range(3)
        ]
        for i in range(3)
    ]
    one = jax.jit(one)
    assert_same(got, stack([stack([one(pair) for pair in pairs_of_row]) for pairs_of_row in pairs]))


def test_an_inner_vmap_maps_some_of_an_outer_ones_arguments(kernel):
    """The outer vmap maps query, key and value, the inner one query alone. The query has both axes and the keys
    have one, so the two axes cannot be merged into one."""
    each = entries(PLAIN)
    arrays = each[0] | {name: stack([a[name] for a in each]) for name in ("key", "value")}
    queries = stack([stack([a["query"], -a["query"]]) for a in each])
    call = attention(PLAIN, kernel)

    def one(query, key, value):
        return call(arrays | {"query": query, "key": key, "value": value})

    got = jax.vmap(jax.vmap(one, (0, None, None)))(queries, arrays["key"], arrays["value"])
    wanted = [stack([call(a | {"query": sign * a["query"]}) for sign in (1, -1)]) for a in each]
    assert_same(got, stack(wanted))


def test_vmap_is_one_custom_call_and_copies_no_shared_keys(kernel):
    each = entries(PLAIN)
    arrays = each[0] | {"query": stack([a["query"] for a in each])}
    mapped = jax.vmap(attention(PLAIN, kernel), in_axes=(axes(["query"], arrays),))
    program = jax.jit(mapped).lower(arrays).compile().as_text()
    assert custom_calls(program) == {"forward": 1}
    assert "f32[1,2,7,2,8]" in program  # key as [1, b, sk, hk, d]
    assert "f32[3,2,7,2,8]" not in program


def test_vmap_over_no_entries_is_empty(kernel):
    arrays = {name: jnp.zeros((0, *x.shape), x.dtype) for name, x in arrays_of(PLAIN).items()}
    got = jax.jit(jax.vmap(with_gradients(attention(PLAIN, kernel))))(arrays)
    assert got["results"][0].shape == (0, 2, 5, 4, 8)
    assert got["gradients"]["key"].shape == (0, 2, 7, 2, 8)


# control flow


def layers(arrays, attend, loop):
    """Attention applied four times: query carried, key and value closed over, scale by step scanned over."""
    xs = jnp.arange(1.0, 5.0, dtype=jnp.float32)

    def body(query, x):
        out, lse = attend({"query": query * x, "key": arrays["key"], "value": arrays["value"]})
        return query + out, lse

    return loop(body, arrays["query"], xs)


def python_loop(body, carry, xs):
    ys = []
    for x in xs:
        carry, y = body(carry, x)
        ys.append(y)
    return carry, jnp.stack(ys)


def test_scan_is_the_loop(kernel):
    """The gradients of the closed-over key and value are sums over the steps."""
    got, wanted = (
        jax.jit(with_gradients(partial(layers, attend=attention(PLAIN, kernel), loop=loop)))(arrays_of(PLAIN))
        for loop in (jax.lax.scan, python_loop)
    )
    assert_same(got, wanted)


def test_scan_under_vmap_and_cond_under_scan(kernel):
    def loop(body, carry, xs):
        def sometimes(carry, x):
            return jax.lax.cond(x > 2, body, lambda c, _: (c, jnp.zeros((2, 4, 5), jnp.float32)), carry, x)

        return jax.lax.scan(sometimes, carry, xs)

    run = partial(layers, attend=attention(PLAIN, kernel), loop=loop)
    each = entries(PLAIN)
    got = jax.jit(jax.vmap(with_gradients(run)))(stack(each))
    one = jax.jit(with_gradients(run))
    assert_same(got, stack([one(arrays) for arrays in each]))


# jax.checkpoint


def equations(jaxpr, name):
    """How many equations of a jaxpr, nested ones included, are the primitive `name`."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == name
        for parameter in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            count += equations(inner, name) if hasattr(inner, "eqns") else 0
    return count


POLICIES = {
    "no checkpoint": (lambda f: f, 1),
    "plain": (jax.checkpoint, 2),
    "nothing saveable": (partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable), 2),
    "everything saveable": (partial(jax.checkpoint, policy=jax.checkpoint_policies.everything_saveable), 1),
    "flash_out and flash_lse saved": (
        partial(
            jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("flash_out", "flash_lse")
        ),
        1,
    ),
    "flash_out alone saved": (
        partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("flash_out")),
        2,
    ),
}


@pytest.mark.parametrize("name", POLICIES)
def test_checkpoint_policies_decide_how_often_the_forward_runs(kernel, name):
    checkpoint, forwards = POLICIES[name]
    arrays = arrays_of(PLAIN)

    def block(arrays):
        out, lse = attention(PLAIN, kernel)({name: jnp.sin(x) for name, x in arrays.items()})
        return jnp.tanh(out), lse

    run = with_gradients(checkpoint(block))
    jaxpr = jax.make_jaxpr(run)(arrays).jaxpr
    assert equations(jaxpr, "jax_flash_forward") == forwards
    assert equations(jaxpr, "jax_flash_backward") == 1
    assert_same(jax.jit(run)(arrays), jax.jit(with_gradients(block))(arrays))


def saved_in_a_scan(x):
    """The gradient of a scan over two layers that saves attention's results."""
    policy = jax.checkpoint_policies.save_only_these_names("flash_out", "flash_lse")
    layer = jax.checkpoint(lambda x, _: (flash_attention(x, x, x) + x, None), policy=policy)
    return jax.grad(lambda x: jax.lax.scan(layer, x, length=2)[0].sum())(x)


def test_what_a_scan_saves_is_computed_once(kernel):
    program = jax.jit(saved_in_a_scan).lower(jnp.ones((1, 128, 2, 64), jnp.bfloat16)).compile()
    assert program.as_text().count('custom_call_target="jax_flash_forward"') == 1


def test_xlas_slice_fusions_for_gpus_do_not_see_the_forward(lowers_for_cuda):
    """Reads the program for GPUs, and needs none. Such a fusion would call the forward a second time to write its
    result into the array that a scan saves."""
    traced = jax.jit(saved_in_a_scan).trace(jnp.ones((1, 128, 2, 64), jnp.bfloat16))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    call, rest = text.split(":3 = stablehlo.custom_call @jax_flash_forward")
    call = call.split()[-1]
    (use,) = (line for line in rest.split("func.func")[0].splitlines() if f"{call}#" in line)
    assert f"stablehlo.optimization_barrier {call}#0, {call}#1" in use


def test_dropout_is_the_same_when_recomputed(kernel):
    case = varlen("dropout", (5, 9), dropout_rate=0.5)
    call = attention(case, kernel)
    arrays = arrays_of(case)
    got, wanted = (jax.jit(with_gradients(f))(arrays) for f in (jax.checkpoint(call), call))
    assert_same(got, wanted)
