"""A loss around a jvp whose tangent is stopped, as in MeanFlow: second derivatives are asked for and dropped."""

from functools import cache, partial

import checks
import jax
import jax.numpy as jnp
import pytest
from programs import assert_same, custom_calls

from jax_flash import flash_attention


@pytest.fixture(autouse=True)
def built(kernel):
    checks.require(kernel, "forward", "tangent", "backward")


WRAPPERS = {
    "plain": lambda f: f,
    "jit inside": jax.jit,
    "checkpoint": jax.checkpoint,
    "named residuals": partial(
        jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("flash_out", "flash_lse")
    ),
}


def network(params, x, t, implementation, wrap, loop):
    """Two layers of attention with residual connections, at time t."""

    @wrap
    def layer(x, weights):
        q, k, v = ((x @ weights[i] + t).reshape(*x.shape[:2], 2, 4) for i in range(3))
        out = flash_attention(q, k, v, causal=True, implementation=implementation)
        return x + jnp.tanh(out.reshape(x.shape) @ weights[3]), None

    if loop == "scan":
        return jax.lax.scan(layer, x, params)[0]
    for weights in params:
        x, _ = layer(x, weights)
    return x


def mean_flow(params, x, direction, **how):
    """MeanFlow's loss: the network must equal a target that contains its own derivative along the flow."""
    u, du = jax.jvp(lambda x, t: network(params, x, t, **how), (x, 0.3), (direction, 1.0))
    return jnp.mean((u - jax.lax.stop_gradient(direction - 0.3 * du)) ** 2)


@cache
def mean_flow_step(implementation, wrap, loop):
    """value_and_grad of the loss, and its arguments."""
    loss = partial(mean_flow, implementation=implementation, wrap=WRAPPERS[wrap], loop=loop)
    x, direction = jax.random.normal(jax.random.key(1), (2, 2, 6, 8))
    return jax.value_and_grad(loss), (jax.random.normal(jax.random.key(0), (2, 4, 8, 8)) / 3, x, direction)


@cache
def mean_flow_in_plain_jax():
    step, arguments = mean_flow_step("xla", "plain", "scan")
    return jax.jit(step)(*arguments)


@pytest.mark.parametrize(
    ("wrap", "loop"),
    [
        ("plain", "python"),
        ("plain", "scan"),
        ("jit inside", "python"),
        ("checkpoint", "scan"),
        ("named residuals", "scan"),
    ],
)
def test_mean_flow_runs_one_call_of_each_pass_per_layer(kernel, wrap, loop):
    step, arguments = mean_flow_step(kernel, wrap, loop)
    compiled = jax.jit(step).lower(*arguments).compile()
    assert_same(compiled(*arguments), mean_flow_in_plain_jax(), tolerance=1e-4)
    layers = 1 if loop == "scan" else 2
    forwards = 2 if wrap == "checkpoint" else 1
    wanted = {"forward": forwards * layers, "tangent": layers, "backward": layers}
    assert custom_calls(compiled.as_text()) == wanted


@pytest.mark.parametrize(("wrap", "loop"), [("plain", "python"), ("checkpoint", "scan")])
def test_mean_flow_op_by_op(kernel, wrap, loop):
    step, arguments = mean_flow_step(kernel, wrap, loop)
    assert_same(step(*arguments), mean_flow_in_plain_jax(), tolerance=1e-4)


def test_mean_flow_step_of_a_flax_model(kernel, exact_products):
    nnx = pytest.importorskip("flax.nnx")
    from flax_inputs import X, ours

    def loss(model, x, direction):
        graph, params = nnx.split(model)

        def flow(x, t):
            return nnx.merge(graph, params)(x + t)

        u, du = jax.jvp(flow, (x, jnp.float32(0.5)), (direction, jnp.float32(1)))
        return jnp.mean((u - jax.lax.stop_gradient(direction - 0.5 * du)) ** 2)

    def step(fn):
        layer = nnx.MultiHeadAttention(2, X.shape[-1], attention_fn=fn, decode=False, rngs=nnx.Rngs(0))
        value, gradients = nnx.jit(nnx.value_and_grad(loss))(layer, X, jnp.cos(X))
        return value, nnx.to_pure_dict(gradients)

    assert_same(step(ours), step(nnx.dot_product_attention), tolerance=1e-4)
