"""jax_flash.compat.splash against JAX's Splash attention: its reference in jax.numpy, and its kernel in Pallas."""

import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flash_attn_reference import assert_close, i32, normal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import require_devices
from splash_cases import (
    DV,
    HQ,
    IDS,
    KEY,
    MASKS,
    ROW,
    SHAPE,
    SQ,
    K,
    Q,
    V,
    compare,
    jax_own,
    make,
    multi_head,
    results,
    sees,
)

from jax_flash.compat import splash
from jax_flash.compat.costs import CostWarning
from jax_flash.compat.splash_masks import Band, structure

pytestmark = pytest.mark.usefixtures("exact_products")


@cache
def own_results(name, segments):
    """results() of Splash's reference, with zero weights for the rows that see nothing."""
    reference = jax_own().make_masked_mha_reference(multi_head(jax_own("mask"), name))
    ids = IDS if segments else None
    weights = np.where(sees(multi_head(splash, name), ids), normal(4, 2, HQ, SQ, DV), 0)

    def right(q, k, v, ids):
        out, (lse,) = reference(q, k, v, ids, save_residuals=True)
        return out, (lse,)

    return results(right, weights, (Q, K, V), ids)


@pytest.mark.parametrize("ids", [None, IDS], ids=["", "segments"])
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_is_splash_s_own(name, ids, implementation):
    """Results and gradients equal those of Splash's reference."""
    mask = multi_head(splash, name)
    weights = np.where(sees(mask, ids), normal(4, 2, HQ, SQ, DV), 0)
    kernel = make(mask, save_residuals=True, implementation=implementation)
    form = "dense" if kernel.dense is not None else "ranges" if kernel.ranges else "band"
    assert form == MASKS[name][1]
    got, wanted = results(kernel, weights, (Q, K, V), ids), own_results(name, ids is not None)
    seen = sees(mask, ids)
    compare((np.where(seen, got[0], 0), *got[1:]), (np.where(seen, wanted[0], 0), *wanted[1:]))
    assert not np.asarray(got[0])[~np.broadcast_to(seen, got[0].shape)].any()


@pytest.mark.parametrize("name", MASKS)
def test_jax_s_own_masks_are_read_as_ours(name):
    theirs, ours = (multi_head(module, name) for module in (jax_own("mask"), splash))
    assert np.array_equal(theirs[:, :, :], ours[:, :, :])
    for a, b in zip(theirs.masks, ours.masks):
        a, b = structure(a), structure(b)
        assert type(a) is type(b)
        assert a == b if isinstance(a, Band) else np.array_equal(a, b)


def test_random_masks_have_the_elements_of_jax_s_own_and_leave_numpy_s_generator():
    own = jax_own("mask").make_random_mask(SHAPE, 0.3, 7)
    before = np.random.get_state()[1:3]  # noqa: NPY002
    ours = splash.make_random_mask(SHAPE, sparsity=0.3, seed=7)
    assert ours.dtype == np.bool_
    assert np.array_equal(ours, own)
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state()[1:3], before))  # noqa: NPY002


OPTIONS = {"cap": dict(attn_logits_soft_cap=1.5), "sinks": dict(), "both": dict(attn_logits_soft_cap=2.0)}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, implementation):
    own, options = jax_own(), OPTIONS[name]
    sinks = () if name == "cap" else (normal(5, 2, HQ),)
    reference = own.make_masked_mha_reference(multi_head(jax_own("mask"), "causal, offset 3"))
    kernel = make(
        multi_head(splash, "causal, offset 3"),
        save_residuals=True,
        implementation=implementation,
        **options,
    )

    def right(q, k, v, ids, *sinks):
        return reference(q, k, v, ids, *sinks, save_residuals=True, **options)

    weights, arrays = normal(4, 2, HQ, SQ, DV), (Q, K, V, *sinks)
    compare(results(kernel, weights, arrays), results(right, weights, arrays))


def test_the_kernel_is_jax_s_own():
    """Against JAX's Pallas kernel in interpreter mode, which needs blocks of 128."""
    own, s = jax_own(), 128
    q, k, v = normal(0, 4, s, 32) / 6, normal(1, 2, s, 32), normal(2, 2, s, 32)
    ids, sinks = i32(*[0] * 50, *[1] * 78), normal(3, 4)
    shards = dict(head_shards=1, q_seq_shards=1)

    def loss(module, masks, **options):
        mask = masks.MultiHeadMask([masks.LocalMask((s, s), (70, 3), 0)] * 4)
        kernel = module.make_splash_mha(mask, **shards, attn_logits_soft_cap=3.0, **options)

        def run(*x):
            out = kernel(*x[:3], module.SegmentIds(ids, ids), x[3])
            return jnp.sin(out).sum(), out

        (_, out), gradients = jax.value_and_grad(run, (0, 1, 2), has_aux=True)(q, k, v, sinks)
        return out, out.sum(-1), *gradients

    compare(loss(splash, splash), loss(own, jax_own("mask"), interpret=True))


def test_keys_of_one_head_come_without_it(implementation):
    own = jax_own()
    name = "two windows"
    reference = own.make_masked_mqa_reference(multi_head(jax_own("mask"), name))
    kernel = make(
        multi_head(splash, name),
        splash.make_splash_mqa_single_device,
        save_residuals=True,
        implementation=implementation,
    )

    def right(q, k, v, ids):
        return reference(q, k, v, ids, save_residuals=True)

    weights, arrays = normal(4, 2, HQ, SQ, DV), (Q, K[:, 0], V[:, 0])
    compare(results(kernel, weights, arrays), results(right, weights, arrays))


def test_without_residuals_there_is_the_result_alone():
    kernel = make(multi_head(splash, "causal"))
    assert kernel(Q[0], K[0], V[0]).shape == (HQ, SQ, DV)


def test_a_query_that_sees_nothing_gives_zero():
    kernel = make(multi_head(splash, "causal, offset −2"), save_residuals=True)
    out, (lse,) = kernel(Q[0], K[0], V[0])
    assert not out[:, :2].any()
    assert (lse[:, :2] == -np.inf).all()


def test_arrays_of_all_heads_are_masks():
    seen = np.stack([ROW + h >= KEY for h in range(HQ)])
    right = make(splash.MultiHeadMask([splash.NumpyMask(x) for x in seen]))(Q[0], K[0], V[0])
    assert np.array_equal(make(seen)(Q[0], K[0], V[0]), right)
    assert np.array_equal(make(jnp.asarray(seen))(Q[0], K[0], V[0]), right)

    @jax.jit
    def traced(seen, *arrays):
        return make(seen)(*arrays)

    assert_close(traced(seen, Q[0], K[0], V[0]), np.asarray(right))


def test_dense_masks_warn():
    mask = multi_head(splash, "an array")
    with pytest.warns(
        CostWarning, match=r"^splash: mask becomes a dense boolean mask of 216 bytes, since a query"
    ):
        splash.make_splash_mha_single_device(mask)


def test_a_mask_of_one_s_own_is_read_by_rows():
    """JAX's masks whose queries are permuted, such as MaxText's load-balanced mask."""

    class Permuted(splash.Mask):
        shape = SHAPE
        order = np.random.default_rng(6).permutation(SQ)

        def seen(self, i, j):
            return j <= self.order[i]

    theirs = jax_own("mask").CausalMask(SHAPE)
    theirs.q_sequence = Permuted.order.astype(np.int32)
    for mask in (Permuted(), theirs):
        found = structure(mask)
        assert found.tolist() == [[[0] * SQ, (Permuted.order + 1).tolist()]]


def test_long_masks_are_never_whole_arrays():
    """The program creates no array of S × S elements."""
    s = 4096
    windows = splash.LocalMask((s, s), (9, 0), 0) | splash.LocalMask((s, s), (0, 9), 100)
    heads = [splash.CausalMask((s, s)), windows]
    x = jax.ShapeDtypeStruct((2, s, 16), jnp.float32)
    program = jax.jit(splash.make_splash_mha_single_device(splash.MultiHeadMask(heads))).lower(x, x, x)
    assert f"{s}x{s}" not in program.as_text()


def test_the_kernel_is_a_pytree():
    for name in ("causal", "by head", "an array"):
        kernel = make(multi_head(splash, name))
        got = jax.jit(lambda kernel, *x: kernel(*x))(kernel, Q[0], K[0], V[0])
        assert_close(got, np.asarray(kernel(Q[0], K[0], V[0])))


@pytest.mark.parametrize("name", ["causal", "chunked", "by head", "by head, an array"])
def test_shards_of_heads_and_queries(name, kernel):
    require_devices(4)
    mesh = jax.make_mesh((2, 2), ("h", "s"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    mask = multi_head(splash, name)
    whole = make(mask, splash.make_splash_mha, head_shards=2, q_seq_shards=2, implementation=kernel)
    spec = whole.manual_sharding_spec(NamedSharding(mesh, P("h", "s")))
    ids = splash.SegmentIds(P("s"), P())
    heads, rows = P("h", None, None), P("h", "s", None)

    @jax.shard_map(mesh=mesh, in_specs=(spec, rows, heads, heads, ids), out_specs=rows)
    def run(kernel, q, k, v, ids):
        return kernel(q, k, v, ids)

    one = splash.SegmentIds(*(x[0] for x in IDS))
    right = make(mask)(Q[0], K[0], V[0], one)
    assert_close(jax.jit(run)(whole, Q[0], K[0], V[0], one), np.asarray(right))


def test_shards_may_be_named_where_they_are_1_by_default():
    for one in (splash.make_splash_mha_single_device, splash.make_splash_mqa_single_device):
        kernel = one(multi_head(splash, "causal"), head_shards=2, q_seq_shards=3)
        assert kernel.shards == (2, 3)
        assert one(multi_head(splash, "causal")).shards == (1, 1)


def test_a_name_for_remat():
    kernel = make(multi_head(splash, "causal"), residual_checkpoint_name="context", save_residuals=True)
    assert str(jax.make_jaxpr(kernel)(Q[0], K[0], V[0])).count("name=context") == 2


def test_what_tunes_tpus_has_no_effect():
    mask = multi_head(splash, "local")
    tuned = make(
        mask,
        block_sizes=splash.BlockSizes.get_default(),
        mask_value=-1e9,
        downcast_smem_data=False,
        interpret=True,
    )
    assert np.array_equal(tuned(Q[0], K[0], V[0]), make(mask)(Q[0], K[0], V[0]))


def test_bands_are_options_of_the_kernels():
    """They run the plain kernels, whose only operands are q, k and v."""
    kernel = make(multi_head(splash, "causal and local"))
    program = str(jax.make_jaxpr(kernel)(Q[0], K[0], V[0]))
    assert "ranges" not in program
    assert "left=2, right=1" in program


def mask_of(*shape):
    return splash.MultiHeadMask([splash.CausalMask(shape[1:])] * shape[0])


CAUSAL = splash.CausalMask(SHAPE)
ERRORS = {
    "one head": (
        lambda: make(CAUSAL),
        "splash: mask must be a MultiHeadMask or a boolean array, of shape [hq, sq, sk], got CausalMask of",
    ),
    "shards": (
        lambda: splash.make_splash_mha(mask_of(4, 12, 18), head_shards=3, q_seq_shards=1),
        "splash: head_shards is 3, allowed are divisors of the mask's 4",
    ),
    "heads": (lambda: make(mask_of(3, 12, 18))(Q[0], K[0], V[0]), "splash: q has 4 heads, the mask has 3"),
    "queries": (lambda: make(mask_of(4, 9, 18))(Q[0], K[0], V[0]), "splash: q has 12 queries, the mask has 9"),
    "keys": (lambda: make(mask_of(4, 12, 9))(Q[0], K[0], V[0]), "splash: k has 18 keys, the mask has 9"),
    "rank": (
        lambda: make(mask_of(4, 12, 18))(Q, K[0], V[0]),
        "splash: q must have rank 3 [hq sq d], got shape (2, 4, 12, 16)",
    ),
    "MQA": (
        lambda: make(mask_of(4, 12, 18), splash.make_splash_mqa_single_device)(Q[0], K[0], V[0]),
        "splash: k must have rank 2 [sk d], got shape (2, 18, 16)",
    ),
    "segments": (
        lambda: make(mask_of(4, 12, 18))(Q[0], K[0], V[0], splash.SegmentIds(IDS.kv[0], IDS.kv[0])),
        "splash: segment_ids.q must have shape [sq] = (12,), got (18,)",
    ),
    "a pair": (
        lambda: make(mask_of(4, 12, 18))(Q[0], K[0], V[0], (IDS.q[0], IDS.kv[0])),
        "splash: segment_ids must be SegmentIds(q, kv), got tuple; SegmentIds(*pair) makes it of two",
    ),
    "a traced mask of numbers": (
        lambda: jax.eval_shape(make, jax.ShapeDtypeStruct((4, 12, 18), jnp.float32)),
        "splash: mask has dtype float32, allowed are bool; True is where a query sees a key",
    ),
    "sinks": (
        lambda: make(mask_of(4, 12, 18))(Q[0], K[0], V[0], None, np.ones(2)),
        "splash: sinks must have shape [hq] = (4,), got (2,)",
    ),
    "other shapes": (lambda: CAUSAL & splash.CausalMask((3, 3)), "splash: masks that are combined must have one"),
    "other heads": (
        lambda: splash.MultiHeadMask([CAUSAL, splash.CausalMask((3, 3))]),
        "splash.MultiHeadMask: masks must be one of queries × keys for each head, all of one shape, got",
    ),
    "no booleans": (
        lambda: splash.NumpyMask(np.ones((3, 3))),
        "splash.NumpyMask: array must be boolean of rank 2, got float64 of shape (3, 3)",
    ),
    "chunks of nothing": (
        lambda: splash.ChunkedCausalMask(SHAPE, 0),
        "splash.ChunkedCausalMask: chunk_size must be at least 1, got 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name):
    call, message = ERRORS[name]
    with pytest.raises((ValueError, TypeError), match="^" + re.escape(message)):
        call()


def test_a_mask_has_no_truth_value():
    with pytest.raises(NotImplementedError, match="combine masks by & and"):
        bool(CAUSAL)
