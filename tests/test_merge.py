"""merge_attention: merged parts over disjoint keys equal the whole, in value and in gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import require_devices

from jax_flash import flash_attention, flash_attention_varlen, merge_attention

NOTHING = -jnp.inf


def random(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def qkv(sq=7, sk=13, dtype=jnp.float32):
    return random(2, sq, 4, 16, seed=1), random(2, sk, 2, 16, seed=2), random(2, sk, 2, 8, seed=3)


def close(got, expected, tolerance=1e-5):
    np.testing.assert_allclose(got, expected, atol=tolerance, rtol=tolerance)


def in_parts(q, k, v, cuts, options, per_part=None):
    """(out, lse) of the parts of the keys between `cuts`, merged; each part may have options of its own."""
    bounds = [0, *cuts, k.shape[1]]
    parts = [
        flash_attention(q, k[:, start:stop], v[:, start:stop], return_lse=True, **options, **own)
        for start, stop, own in zip(bounds[:-1], bounds[1:], per_part or [{}] * len(bounds[1:]), strict=True)
    ]
    return merge_attention(*zip(*parts, strict=True))


@pytest.mark.parametrize("cuts", [[], [5], [1, 12], [0, 6, 6]])
def test_parts_of_the_keys_merge_to_the_whole(cuts, implementation):
    q, k, v = qkv()
    options = {"implementation": implementation}
    out, lse = in_parts(q, k, v, cuts, options)
    whole, whole_lse = flash_attention(q, k, v, return_lse=True, **options)
    close(out, whole)
    close(lse, whole_lse)


def test_parts_that_a_row_does_not_see_add_nothing(implementation):
    q, k, v = qkv()
    mask = jnp.arange(13)[None] < jnp.array([0, 2, 5, 6, 9, 12, 13])[:, None]
    options = {"implementation": implementation}
    per_part = [{"mask": mask[:, :6]}, {"mask": mask[:, 6:]}]
    out, lse = in_parts(q, k, v, [6], options, per_part)
    whole, whole_lse = flash_attention(q, k, v, mask=mask, return_lse=True, **options)
    close(out, whole)
    close(lse, whole_lse)
    assert (np.asarray(out)[:, 0] == 0).all()
    assert np.isneginf(np.asarray(lse)[..., 0]).all()


def test_whatever_a_part_without_keys_holds_adds_nothing():
    """Other libraries' kernels may leave NaN there."""
    out = jnp.ones((1, 3, 2, 4))
    lse = jnp.zeros((1, 2, 3))
    for rest in (jnp.nan, jnp.inf):
        merged, _ = merge_attention([out, jnp.full_like(out, rest)], [lse, jnp.full_like(lse, -jnp.inf)])
        close(merged, out)


def test_sinks_belong_to_one_part(implementation):
    q, k, v = qkv()
    sinks = random(4, seed=4)
    options = {"implementation": implementation}
    out, lse = in_parts(q, k, v, [6], options, [{"sinks": sinks}, {}])
    whole, whole_lse = flash_attention(q, k, v, sinks=sinks, return_lse=True, **options)
    close(out, whole)
    close(lse, whole_lse)


def test_sinks_may_lie_on_a_part_without_keys(implementation):
    q, k, v = qkv()
    sinks = random(4, seed=4)
    options = {"implementation": implementation}
    out, lse = in_parts(q, k, v, [0], options, [{"sinks": sinks}, {}])
    whole, whole_lse = flash_attention(q, k, v, sinks=sinks, return_lse=True, **options)
    close(out, whole)
    close(lse, whole_lse)


def test_packed_parts_merge(implementation):
    q, k, v = random(9, 4, 16, seed=1), random(9, 2, 16, seed=2), random(9, 2, 8, seed=3)
    cu = jnp.array([0, 4, 9], jnp.int32)
    options = {"return_lse": True, "implementation": implementation}
    whole, whole_lse = flash_attention_varlen(q, k, v, cu, **options)
    kept = jnp.array([1, 3], jnp.int32)
    first = flash_attention_varlen(q, k, v, cu, kv_lengths=kept, **options)
    rest_rows = np.r_[1:4, 7:9]
    rest = flash_attention_varlen(
        q, k[rest_rows], v[rest_rows], cu, jnp.array([0, 3, 5], jnp.int32), **options
    )
    out, lse = merge_attention(*zip(first, rest, strict=True))
    close(out, whole)
    close(lse, whole_lse)


def test_parts_in_float64_merge_in_float64():
    """The parts, their lse and the result stay float64."""
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((2, n, 4, 16)) for n in (7, 13, 13))
    options = {"implementation": "xla", "return_lse": True}
    with jax.enable_x64(True):
        parts = [flash_attention(q, k[:, own], v[:, own], **options) for own in (np.s_[:5], np.s_[5:])]
        out, lse = merge_attention(*zip(*parts, strict=True))
        whole, whole_lse = flash_attention(q, k, v, **options)
    assert out.dtype == lse.dtype == np.float64
    close(out, whole, 1e-13)
    close(lse, whole_lse, 1e-13)


def test_gradients_flow_through_the_merge(implementation):
    q, k, v = qkv()
    mask = jnp.arange(13)[None] < jnp.array([0, 2, 5, 6, 9, 12, 13])[:, None]
    options = {"implementation": implementation}
    weight, lse_weight = random(2, 7, 4, 8, seed=5), random(2, 4, 7, seed=6)

    def loss(out, lse):
        return (out * weight).sum() + (jnp.where(lse > NOTHING, lse, 0) * lse_weight).sum()

    def merged(q, k, v):
        return loss(*in_parts(q, k, v, [6], options, [{"mask": mask[:, :6]}, {"mask": mask[:, 6:]}]))

    def whole(q, k, v):
        return loss(*flash_attention(q, k, v, mask=mask, return_lse=True, **options))

    got = jax.jit(jax.grad(merged, (0, 1, 2)))(q, k, v)
    expected = jax.jit(jax.grad(whole, (0, 1, 2)))(q, k, v)
    for gradient, right in zip(got, expected, strict=True):
        close(gradient, right, 1e-4)


def test_gradients_are_finite_where_no_part_saw_anything():
    outs, lses = [jnp.zeros((3, 1, 2))] * 2, [jnp.full((1, 3), NOTHING)] * 2

    def total(outs, lses):
        return merge_attention(outs, lses)[0].sum()

    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.grad(total, (0, 1))(outs, lses)))


def test_large_sums_do_not_overflow():
    outs = [jnp.full((1, 1, 2), 1.0), jnp.full((1, 1, 2), 3.0)]
    out, lse = merge_attention(outs, [jnp.array([[1000.0]]), jnp.array([[1000.0]])])
    close(out, np.full((1, 1, 2), 2.0))
    close(lse, [[1000 + np.log(2)]])


def test_out_has_the_first_parts_dtype_and_is_summed_in_float32():
    outs = [jnp.full((1, 1, 8), 1.0, jnp.bfloat16)] + [jnp.full((1, 1, 8), 1.0, jnp.float32)] * 299
    out, lse = merge_attention(outs, [jnp.zeros((1, 1), jnp.float32)] * 300)
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    close(out.astype(jnp.float32), np.ones((1, 1, 8)))
    close(lse, [[np.log(300)]])


def test_parts_that_explicit_axes_split_differently_merge_as_the_first_is_split():
    require_devices(4)
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    parts = [part_of_ones(n) for n in (1.0, 3.0)]
    specs = [(P(None, None, "a"), P(None, "a")), (P("a", None, None, "b"), P("b", None, "a"))]
    placed = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), parts, specs)

    def total(parts):
        return merge_attention(*zip(*parts, strict=True))[0].sum()

    with jax.set_mesh(mesh):
        out, lse = jax.jit(lambda parts: merge_attention(*zip(*parts, strict=True)))(placed)
        gradients = jax.jit(jax.grad(total))(placed)
    assert (out.sharding.spec, lse.sharding.spec) == (P(None, None, "a", None), P(None, "a", None))
    close(out, np.full(out.shape, 2.0))
    for got, expected in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(jax.grad(total)(parts)), strict=True
    ):
        close(got, expected)


def part_of_ones(value):
    return jnp.full((2, 6, 4, 8), value), jnp.zeros((2, 4, 6))


def test_it_works_under_strict_promotion_and_x64():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"), jax.enable_x64(True):
        outs, lses = [jnp.ones((2, 1, 8), jnp.bfloat16)] * 2, [jnp.zeros((1, 2), jnp.float32)] * 2
        out, lse = merge_attention(outs, lses)
        assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize(("outs", "lses"), [(0, 1), (1, 0), (0, 0)], ids=["outs", "lses", "both"])
def test_a_bare_array_is_refused_since_its_batch_would_be_taken_for_parts(outs, lses):
    out, lse = part()
    with pytest.raises(
        TypeError, match=r"merge_attention: (outs|lses) must be a list or a tuple with one array"
    ):
        merge_attention(([out], out)[outs == 0], ([lse], lse)[lses == 0])


def part(out=(2, 3, 4, 8), lse=(2, 4, 3)):
    return jnp.zeros(out), jnp.zeros(lse)


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        ([], [], "outs is empty; it needs at least one part"),
        ([part()[0]], [part()[1]] * 2, "lses has 2 parts, which is not outs' 1"),
        ([jnp.zeros((3, 4))], [jnp.zeros((3,))], r"outs\[0\] has shape \(3, 4\); it must be"),
        ([part()[0], part((2, 3, 4, 9))[0]], [part()[1]] * 2, r"outs\[1\] has shape \(2, 3, 4, 9\)"),
        ([part()[0]], [part(lse=(2, 3, 4))[1]], r"lses\[0\] has shape \(2, 3, 4\).*= \(2, 4, 3\)"),
    ],
)
def test_errors_name_the_argument_and_the_value(outs, lses, message):
    with pytest.raises(ValueError, match=f"merge_attention: {message}"):
        merge_attention(outs, lses)


def test_parts_that_are_no_arrays_are_named():
    out, lse = jnp.zeros((2, 5, 3, 8)), jnp.zeros((2, 3, 5))
    with pytest.raises(TypeError, match=r"merge_attention: outs\[1\] must be an array, got None"):
        merge_attention([out, None], [lse, lse])
    with pytest.raises(TypeError, match=r"merge_attention: lses\[0\] must be an array, got 'x'"):
        merge_attention([out], ["x"])
