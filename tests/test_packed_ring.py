"""Under jit, a row of packed sequences whose tokens are split alike in query, key and value runs as a ring."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import varlen
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import arrays_of, check, check_run, place, qkv, stack, within
from programs import attention, collectives, custom_calls, shard_shapes
from test_derivative_sharding import jvp_of

from jax_flash import flash_attention_varlen, masks

PACKED = varlen("packed", (9, 0, 14, 5), padding=(4, 4), hq=8, hk=4, d=8, dv=8, causal=True)
TOKENS = P("model")


def packed(case, kernel, **options):
    """The call, with one array of offsets for queries and keys."""
    call = attention(case, kernel, **options)
    return lambda arrays: call(arrays | {"cu_seqlens_k": None})


def assert_packed_ring(text, visits, sums=0):
    """One forward and one backward: K travels with V, dK with dV; the documents' numbers, integers, travel too."""
    assert collectives(text) == {"collective-permute": 5 * (visits - 1)} | (
        {"all-reduce": sums} if sums else {}
    )
    assert custom_calls(text) == {"forward": visits, "backward": visits}


@pytest.mark.parametrize(
    ("changes", "visits"),
    [
        ({}, 4),
        ({"causal": False}, 4),
        ({"window": (5, 0)}, 2),
        ({"alibi_slopes": (8,), "softcap": 2.0, "sinks": True}, 4),
        ({"window": (5, 0), "sinks": "token"}, 2),
    ],
    ids=["causal", "full", "window", "scores", "sinks by token"],
)
def test_packed_tokens_run_in_a_ring(kernel, mesh, changes, visits):
    """Documents cross shards; the padding after them is not read, and its rows are 0."""
    case = PACKED.replace(**changes)
    text, got = check(packed(case, kernel), mesh, arrays_of(case), qkv(TOKENS))
    assert_packed_ring(text, visits, sums=int(case.sinks is True))  # the gradient of sinks is summed
    for x in (got["results"][0], *(got["gradients"][name] for name in ("query", "key", "value"))):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, TOKENS), 3)


WINDOWS = {
    "left": lambda: masks.window(jnp.int32(5), 0),
    "both sides": lambda: masks.window(jnp.int32(5), jnp.int32(2)),
    "offset": lambda: masks.window(jnp.int32(7), jnp.int32(1), jnp.int32(-2)),
    "causal, offset": lambda: masks.causal(jnp.int32(-3)),
}


@pytest.mark.parametrize("keys", [TOKENS, P()], ids=["split", "whole"])
@pytest.mark.parametrize("name", WINDOWS)
def test_packed_tokens_with_one_window_in_arrays(kernel, mesh, name, keys):
    """As in a scan over layers with windows of their own; XLA cannot know which shards a window hides."""
    call = packed(PACKED.replace(causal=False), kernel)
    run = lambda arrays: call(arrays | {"mask": WINDOWS[name]()})  # noqa: E731
    text, _ = check(run, mesh, arrays_of(PACKED), qkv(TOKENS, keys))
    if keys == TOKENS:
        assert_packed_ring(text, 4)
    else:
        assert set(collectives(text)) == {"all-reduce"}


LENGTHS = (4, 3, 20, 0)  # of documents with 9, 0, 14 and 5 tokens


@pytest.mark.parametrize(
    "changes",
    [{"causal": False}, {"align": "top_left"}, {"align": "top_left", "window": (3, 1)}],
    ids=["full", "causal", "window"],
)
def test_packed_tokens_with_lengths_of_keys(kernel, mesh, changes):
    """These lengths move no diagonal, because there is no band, or it is aligned top left."""
    case = PACKED.replace(kv_lengths=LENGTHS, **changes)
    text, _ = check(packed(case, kernel), mesh, arrays_of(case), qkv(TOKENS))
    assert set(collectives(text)) == {"collective-permute"}


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "lengths"])
def test_packed_keys_with_offsets_of_their_own(kernel, mesh, lengths):
    """Without a band, positions of keys within a document do not matter."""
    case = PACKED.replace(causal=False, k_sequences=(20, 8, 3, 29))
    case = case.replace(kv_lengths=lengths, softcap=2.0)
    text, _ = check(attention(case, kernel), mesh, arrays_of(case), qkv(TOKENS))
    assert set(collectives(text)) == {"collective-permute"}


def test_packed_tokens_and_heads(kernel, mesh):
    text, _ = check(packed(PACKED, kernel), mesh, arrays_of(PACKED), qkv(P("data", "model")))
    assert_packed_ring(text, 2)
    assert shard_shapes(text, "forward") == shard_shapes(text, "backward") == {(1, 16, 2, 8)}


def test_padding_before_and_after_packed_tokens_is_not_read(kernel, mesh):
    arrays = arrays_of(PACKED)
    offsets = jnp.array([3, 9, 9, 21, 27], jnp.int32)
    read = (jnp.arange(32) >= 3) & (jnp.arange(32) < 27)
    poisoned = {
        name: jnp.where(read[:, None, None], arrays[name], jnp.nan) for name in ("query", "key", "value")
    }
    text, got = check(packed(PACKED, kernel), mesh, poisoned | {"cu_seqlens_q": offsets}, qkv(TOKENS))
    assert_packed_ring(text, 4)
    out, lse = jax.device_get(got["results"])
    assert not out[~read].any()
    assert (lse[:, ~read] == -jnp.inf).all()


def test_rows_of_packed_tokens_under_vmap(kernel, mesh):
    """Each row has its own documents; rows are split as well."""
    arrays = stack(PACKED, 2) | {
        "cu_seqlens_q": jnp.array([[0, 9, 9, 23, 28], [0, 16, 20, 30, 32]], jnp.int32)
    }
    del arrays["cu_seqlens_k"]
    specs = qkv(P("data", "model")) | {"cu_seqlens_q": P("data")}
    text, _ = check(jax.vmap(packed(PACKED, kernel)), mesh, arrays, specs)
    assert_packed_ring(text, 4)


def test_forward_mode_of_packed_tokens(kernel, mesh):
    run = jvp_of(packed(PACKED, kernel))
    text, _ = check_run(run, mesh, arrays_of(PACKED), qkv(TOKENS), tolerance=1e-4)
    assert set(collectives(text)) == {"collective-permute"}


# what is gathered


@pytest.mark.parametrize(
    "case",
    [
        PACKED.replace(kv_lengths=(9, 0, 8, 5)),
        PACKED.replace(dropout_rate=0.3),
        PACKED.replace(alibi_slopes=(4, 8)),
    ],
    ids=["lengths", "dropout", "slopes of each sequence"],
)
def test_what_goes_by_the_position_in_each_packed_sequence_is_gathered(kernel, mesh, case):
    check(packed(case, kernel), mesh, arrays_of(case), qkv(TOKENS))


def test_windows_of_each_packed_sequence_are_gathered(kernel, mesh):
    call = packed(PACKED.replace(causal=False), kernel)
    run = lambda arrays: call(arrays | {"mask": masks.window(jnp.array([5, 1, 0, 9], jnp.int32), 0)})  # noqa: E731
    check(run, mesh, arrays_of(PACKED), qkv(TOKENS))


def test_packed_keys_with_offsets_of_their_own_and_a_band_are_gathered(kernel, mesh):
    check(attention(PACKED, kernel), mesh, arrays_of(PACKED), qkv(TOKENS))


def test_keys_with_the_offsets_of_fewer_queries_and_a_band_are_gathered(kernel, mesh):
    """The last document has more keys than queries, so its diagonal is not the one of the row."""
    case = varlen("packed", (10, 6), k_sequences=(10, 22), hq=8, hk=4, d=8, dv=8, causal=True)
    call = attention(case, kernel)
    arrays = arrays_of(case) | {"cu_seqlens_q": jnp.asarray([0, 10, 40], jnp.int32)}
    del arrays["cu_seqlens_k"]
    run = lambda arrays: call(arrays | {"cu_seqlens_k": arrays["cu_seqlens_q"]})  # noqa: E731
    check(run, mesh, arrays, qkv(TOKENS))


def test_packed_batches_without_a_sequence_have_no_lengths_to_look_up(mesh):
    x = place(mesh, {"x": jnp.ones((8, 2, 8), jnp.float32)}, {"x": TOKENS})["x"]
    none = jnp.zeros(0, jnp.int32)
    call = jax.jit(lambda x: flash_attention_varlen(x, x, x, jnp.zeros(1, jnp.int32), kv_lengths=none))
    with within(mesh):
        assert not np.asarray(call(x)).any()
