"""Programs of derivatives: which custom calls they run, how often; derivatives that are missing raise if used."""

from functools import partial

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from oracle import split
from programs import assert_same, attention, custom_calls, with_gradients
from test_transforms import BIASED, FIXED, PLAIN, VARLEN, arrays_of, axes, equations, row, stack

from jax_flash import append_kv, flash_attention, paged_attention


@pytest.fixture(autouse=True)
def built(kernel):
    checks.require(kernel, "forward", "tangent", "backward")


def moving_of(case, seed=0):
    """The operands that have derivatives, and tangents for them."""
    moving, fixed = split(arrays_of(case, seed))
    others, _ = split(arrays_of(case, seed + 10))
    return moving, others, fixed


def twice(call):
    """The call over a batch of two equal entries."""
    return lambda x: jax.vmap(call)(stack([x, x]))


def calls_of(function, *arguments):
    return custom_calls(jax.jit(function).lower(*arguments).compile().as_text())


# One call of each pass that is needed.


@pytest.mark.parametrize("case", [PLAIN, VARLEN], ids=lambda case: case.layout)
def test_each_mode_runs_its_own_pass_and_the_forward_once(kernel, case):
    moving, tangents, fixed = moving_of(case)

    def call(moving):
        return attention(case, kernel)(moving | fixed)

    def linearized(moving, tangents):
        results, tangent = jax.linearize(call, moving)
        return results, tangent(tangents)

    def transposed(moving, cotangents):
        _, tangent = jax.linearize(call, moving)
        return jax.linear_transpose(tangent, moving)(cotangents)[0]

    def jvp(moving, tangents):
        return jax.jvp(call, (moving,), (tangents,))

    both = {"forward": 1, "tangent": 1}
    assert calls_of(jvp, moving, tangents) == calls_of(linearized, moving, tangents) == both
    assert calls_of(lambda *x: jvp(*x)[0], moving, tangents) == {"forward": 1}
    with_all = with_gradients(lambda arrays: call(split(arrays)[0]))
    assert calls_of(with_all, moving) == {"forward": 1, "backward": 1}
    results = call(moving)
    assert calls_of(transposed, moving, results) == {"forward": 1, "backward": 1}
    assert_same(jax.jit(linearized)(moving, tangents), jax.jit(jvp)(moving, tangents))
    wanted = jax.jit(lambda x, ct: jax.vjp(call, x)[1](ct)[0])(moving, results)
    assert_same(jax.jit(transposed)(moving, results), wanted)


def test_no_tangent_pass_where_only_what_moves_whole_rows_has_a_tangent(kernel):
    """Sinks and a bias of one column shift whole rows, so their tangents follow from out and lse."""
    case = PLAIN.replace(sinks=True, bias=(4, 5, 1))
    moving, tangents, _ = moving_of(case)

    def jvp(rows, tangents, implementation):
        call = attention(case, implementation)
        return jax.jvp(lambda rows: call(moving | rows), (rows,), (tangents,))

    rows, moved = ({name: x[name] for name in ("bias", "sinks")} for x in (moving, tangents))
    assert calls_of(partial(jvp, implementation=kernel), rows, moved) == {"forward": 1}
    assert_same(jvp(rows, moved, kernel), jvp(rows, moved, "xla"), tolerance=1e-4)


def test_nan_in_a_sink_reaches_its_gradient(implementation):
    q = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 2, 8)), jnp.float32)

    def loss(sinks):
        return flash_attention(q, q, q, sinks=sinks, implementation=implementation).sum()

    got = jax.grad(loss)(jnp.array([jnp.nan, 0], jnp.float32))
    assert np.isnan(got[0])
    assert np.isfinite(got[1])


def test_gradients_nobody_asked_for_are_not_computed_outside_jit_either(kernel):
    """grad of query alone, op by op, runs no pass for the bias' gradient."""
    arrays = arrays_of(BIASED)

    def pullback(query):
        _, pull = jax.vjp(lambda query: attention(BIASED, kernel)(arrays | {"query": query})[0], query)
        return pull(query)

    names = str(jax.make_jaxpr(pullback)(arrays["query"]))
    assert "jax_flash_backward" in names
    assert "jax_flash_bias_gradient" not in names


# Transforms of either mode give what plain JAX gives.


@pytest.mark.parametrize("case", [FIXED, VARLEN], ids=lambda case: case.layout)
def test_jit_and_vmap_of_jvp(kernel, case):
    each = [moving_of(case, seed) for seed in range(3)]

    def jvp(moving, tangents, fixed):
        return jax.jvp(lambda moving: attention(case, kernel)(moving | fixed), (moving,), (tangents,))

    one = jax.jit(jvp)
    wanted = stack([one(*arguments) for arguments in each])
    assert_same(jax.jit(jax.vmap(jvp))(*stack(each)), wanted)
    assert_same(jvp(*each[0]), row(wanted, 0))


def test_jvp_of_vmap_where_entries_share_arguments(kernel):
    moving, tangents, _ = moving_of(BIASED)
    queries = stack([moving_of(BIASED, seed)[0]["query"] for seed in range(3)])
    moving, tangents = moving | {"query": queries}, tangents | {"query": jnp.cos(queries)}

    def jvp(implementation):
        mapped = jax.vmap(attention(BIASED, implementation), in_axes=(axes(["query"], moving),))
        return jax.jit(lambda *x: jax.jvp(mapped, x[:1], x[1:]))

    assert_same(jvp(kernel)(moving, tangents), jvp("xla")(moving, tangents), tolerance=1e-4)
    program = jvp(kernel).lower(moving, tangents).compile().as_text()
    assert custom_calls(program) == {"forward": 1, "tangent": 1}
    assert "f32[3,2,7,2,8]" not in program  # neither keys nor their tangents are copied


@pytest.mark.parametrize("of", ["query", "key", "sinks"])
def test_jacobians_by_either_mode_agree(kernel, of):
    arrays = arrays_of(BIASED.replace(b=1, sq=2, sk=3, bias=(1, 4, 2, 3)))

    def call(x, implementation):
        return attention(BIASED, implementation)(arrays | {of: x})[0].sum((0, 2))

    forward, reverse = (jax.jit(f(partial(call, implementation=kernel))) for f in (jax.jacfwd, jax.jacrev))
    wanted = jax.jit(jax.jacfwd(partial(call, implementation="xla")))(arrays[of])
    for jacobian in (forward, reverse):
        assert_same(jacobian(arrays[of]), wanted, tolerance=1e-4)
    assert calls_of(forward, arrays[of])["forward"] == 1


def test_jvp_through_scan_and_checkpoint(kernel):
    moving, tangents, _ = moving_of(PLAIN)

    def layers(arrays, implementation, wrap):
        def body(query, scale):
            out, lse = attention(PLAIN, implementation)(arrays | {"query": query * scale})
            return query + out, lse

        return jax.lax.scan(wrap(body), arrays["query"], jnp.arange(1.0, 4.0))

    def jvp(implementation, wrap):
        return jax.jit(lambda *x: jax.jvp(lambda a: layers(a, implementation, wrap), x[:1], x[1:]))

    wanted = jvp("xla", lambda f: f)(moving, tangents)
    for wrap in (lambda f: f, jax.checkpoint):
        assert_same(jvp(kernel, wrap)(moving, tangents), wanted, tolerance=1e-4)
        assert calls_of(jvp(kernel, wrap), moving, tangents) == {"forward": 1, "tangent": 1}


def test_a_donated_query_and_64_bit_mode(kernel):
    moving, tangents, _ = moving_of(PLAIN)

    def jvp(moving, tangents):
        return jax.jvp(attention(PLAIN, kernel), (moving,), (tangents,))

    wanted = jvp(moving, tangents)
    with jax.enable_x64(True):
        assert_same(jax.jit(jvp)(moving, tangents), wanted)
    query = jnp.copy(moving["query"])
    donating = jax.jit(lambda query, others: jvp(others | {"query": query}, tangents), donate_argnums=0)
    assert_same(donating(query, {name: moving[name] for name in ("key", "value")}), wanted)
    assert query.is_deleted()


def test_integers_and_slopes_have_no_tangents(kernel):
    """Lengths have float0 tangents; alibi_slopes and page scales are constants, as they have no gradient."""
    case = PLAIN.replace(kv_lengths=(4, 7), alibi_slopes=(4,))
    arrays = arrays_of(case)
    zeros = jax.tree.map(jnp.zeros_like, arrays) | {"kv_lengths": np.zeros(2, jax.dtypes.float0)}
    tangents = zeros | {"alibi_slopes": jnp.ones(4), "query": arrays["query"]}
    alone = zeros | {"query": arrays["query"]}
    got, wanted = (jax.jvp(attention(case, kernel), (arrays,), (t,))[1] for t in (tangents, alone))
    assert_same(got, wanted)
    assert np.any(got[0] != 0)


# Second derivatives.


MODES = {"jit": jax.jit, "op by op": lambda f: f}


@pytest.mark.parametrize("mode", MODES)
def test_a_stopped_gradient_inside_a_loss(kernel, mode):
    arrays = arrays_of(PLAIN)

    def step(implementation):
        def energy(query):
            out, lse = attention(PLAIN, implementation)(arrays | {"query": query})
            return (out**2).sum() + lse.sum()

        def loss(query):
            moved = query - 0.1 * jax.lax.stop_gradient(jax.grad(energy)(query))
            return energy(moved)

        return MODES[mode](jax.grad(loss))

    assert_same(step(kernel)(arrays["query"]), step("xla")(arrays["query"]), tolerance=1e-4)


SECOND = {
    "gradient of gradient": lambda f, v: jax.grad(lambda x: jax.grad(f)(x).sum()),
    "forward over reverse": lambda f, v: lambda x: jax.jvp(jax.grad(f), (x,), (v,))[1],
    "reverse over forward": lambda f, v: jax.grad(lambda x: jax.jvp(f, (x,), (v,))[1]),
    "forward over forward": lambda f, v: (
        lambda x: jax.jvp(lambda x: jax.jvp(f, (x,), (v,))[1], (x,), (v,))[1]
    ),
    "hessian": lambda f, v: jax.hessian(f),
    "of a mapped call": lambda f, v: jax.vmap(jax.grad(lambda x: jax.grad(f)(x).sum())),
}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", [PLAIN, VARLEN, BIASED], ids=lambda case: case.name)
def test_a_gradient_is_its_own_derivative_with_respect_to_the_cotangents(kernel, case, deterministic):
    moving, _, fixed = moving_of(case)
    f = attention(case, kernel, deterministic=deterministic)
    results, pull = jax.vjp(lambda moving: f(moving | fixed), moving)
    keys = jax.random.split(jax.random.key(1), 4)
    both = [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, 2 * results)]
    cotangents, tangents = tuple(both[:2]), tuple(both[2:])
    none = jnp.zeros_like(tangents[1])
    for given in (tangents, (tangents[0], none)):
        got = jax.jit(lambda x, t: jax.jvp(pull, (x,), (t,)))(cotangents, given)
        assert_same(got, (pull(cotangents), pull(given)))
    mapped = jax.vmap(lambda t: jax.jvp(pull, (cotangents,), (t,))[1])(stack([cotangents, tangents]))
    assert_same(row(mapped, 1), pull(tangents))


def test_a_transpose_of_attentions_gradient_raises_and_names_the_way_out(kernel):
    arrays = arrays_of(PLAIN)
    f = attention(PLAIN, kernel)
    _, pull = jax.vjp(lambda query: f(arrays | {"query": query})[0], arrays["query"])
    with pytest.raises(NotImplementedError, match=r'use implementation="xla"'):
        jax.linear_transpose(pull, arrays["query"])((arrays["query"],))


@pytest.mark.parametrize("name", ["query", "value"])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, twice], ids=["as it is", "jit", "vmap"])
@pytest.mark.parametrize("plain", [False, True], ids=["kernel", "xla"])
def test_a_transpose_of_attention_raises_and_names_the_way_out(kernel, plain, wrap, name):
    arrays = arrays_of(PLAIN)
    call = wrap(attention(PLAIN, "xla" if plain else kernel))

    def out(x):
        return call(arrays | {name: x})[0]

    cotangent = jnp.zeros_like(jax.eval_shape(out, arrays[name]))
    with pytest.raises(NotImplementedError, match=r"use jax\.vjp"):
        jax.linear_transpose(out, arrays[name])(cotangent)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives_that_are_used_raise_and_name_plain_jax(kernel, name, mode):
    arrays = arrays_of(PLAIN)

    def derivative(implementation):
        def loss(query):
            return attention(PLAIN, implementation)(arrays | {"query": query})[0].sum()

        return MODES[mode](SECOND[name](loss, jnp.ones_like(arrays["query"])))

    query = arrays["query"][None] if name == "of a mapped call" else arrays["query"]
    with pytest.raises(NotImplementedError, match=r'second derivative .* use implementation="xla"'):
        derivative(kernel)(query)
    assert np.isfinite(jax.jit(derivative("xla"))(query)).all()


def test_under_jit_a_second_derivative_that_is_dropped_by_forward_mode_costs_nothing(kernel):
    """Outside jit it is computed before it is dropped, and so raises; the message names jit."""
    arrays = arrays_of(PLAIN)

    def loss(query):
        return attention(PLAIN, kernel)(arrays | {"query": query})[0].sum()

    def dropped(query):
        return jax.jvp(jax.grad(loss), (query,), (query,))[0]

    assert calls_of(dropped, arrays["query"]) == {"forward": 1, "backward": 1}
    assert_same(jax.jit(dropped)(arrays["query"]), jax.grad(loss)(arrays["query"]))
    with pytest.raises(NotImplementedError, match=r"or jax\.jit if this one is dropped"):
        dropped(arrays["query"])


# What has no derivative in either mode.


CALL = Case("pages", b=2, sq=1, sk=8, kv_lengths=(3, 5))


def decode_step(kernel, stop):
    """(query, key) → a loss of one decode step that appends the key to pages."""
    import pages

    arrays = pages.paged(CALL, 4).arrays

    def loss(query, key):
        new = stop(key)
        k_pages, v_pages, lengths = append_kv(
            arrays["key"], arrays["value"], new, new, arrays["block_tables"], arrays["kv_lengths"],
            implementation=kernel,
        )  # fmt: skip
        out = paged_attention(query, k_pages, v_pages, arrays["block_tables"], lengths, implementation=kernel)
        return jnp.nansum(out**2)

    return loss, arrays["query"], jnp.ones((2, 1, CALL.hk, CALL.d))


@pytest.mark.parametrize("mode", MODES)
def test_append_says_that_it_has_no_derivative_in_either_mode(implementation, mode):
    checks.require(implementation, "append")
    loss, query, key = decode_step(implementation, lambda x: x)
    message = r"append_kv: there is no derivative, in either mode; pass jax\.lax\.stop_gradient"
    with pytest.raises(NotImplementedError, match=message):
        MODES[mode](jax.grad(loss, argnums=1))(query, key)
    with pytest.raises(NotImplementedError, match=message):
        MODES[mode](lambda key: jax.jvp(partial(loss, query), (key,), (key,)))(key)


def test_the_way_out_of_that_error_works(kernel):
    checks.require(kernel, "append")
    loss, query, key = decode_step(kernel, jax.lax.stop_gradient)
    dquery, dkey = jax.jit(jax.grad(loss, argnums=(0, 1)))(query, key)
    assert np.any(dquery != 0)
    assert not np.any(dkey)


def test_equations_name_the_passes(kernel):
    """What jax.make_jaxpr shows; remat policies see the names of the residuals."""
    arrays = arrays_of(PLAIN)

    def jvp(arrays):
        return jax.jvp(attention(PLAIN, kernel), (arrays,), (arrays,))[1]

    jaxpr = jax.make_jaxpr(jvp)(arrays)
    assert (
        equations(jaxpr.jaxpr, "jax_flash_forward") == equations(jaxpr.jaxpr, "jax_flash_differential") == 1
    )
    names = [e.params["name"] for e in jaxpr.jaxpr.eqns if e.primitive.name == "name"]
    assert names == ["flash_out", "flash_lse"]
