"""paged_attention's draft_mask: what each new token sees of the others, in every layout, against the dense oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pages
import pytest
from cases import DTYPES, Case, varlen
from conftest import IMPLEMENTATION
from jax.sharding import PartitionSpec as P
from pages import FLOAT8, paged, require
from programs import collectives, shard_shapes
from test_paged import by_name
from test_paged_programs import sharded_attention

from jax_flash import paged_attention

# Pictures.

TREE = [  # a root with two children, the first of which has a child
    "#...",
    "##..",
    "#.#.",
    "##.#",
]


def boolean(picture):
    return jnp.asarray([[[x == "#" for x in row] for row in picture]])


def picture(mask, keys, implementation, tokens=None, **options):
    """Which keys each of the last tokens sees, drawn: all scores are equal, and the values identify the keys."""
    require(implementation)
    tokens = mask.shape[-1] if tokens is None else tokens
    width = -(-keys // 8) * 8
    values = jnp.eye(max(keys, 1), width)[:, None, None]  # a page of one slot for each key
    query = jnp.zeros((1, tokens, 1, width))
    tables, lengths = jnp.arange(max(keys, 1), dtype=jnp.int32)[None], jnp.asarray([keys], jnp.int32)
    if "cu_seqlens_q" in options:
        query = query[0]
    out = paged_attention(
        query, jnp.zeros_like(values), values, tables, lengths, draft_mask=mask,
        implementation=implementation, **options,
    )  # fmt: skip
    rows = np.asarray(out).reshape(tokens, width)[:, :keys]
    return ["".join("#" if x > 0 else "." for x in row) for row in rows]


def test_a_token_of_a_tree_sees_its_ancestors_and_all_keys_before_the_draft(implementation):
    assert picture(boolean(TREE), 6, implementation) == ["###...", "####..", "##" + "#.#.", "####.#"]


def test_causal_hides_nothing_of_a_tree_whose_parents_come_first(implementation):
    wanted = picture(boolean(TREE), 6, implementation)
    assert picture(boolean(TREE), 6, implementation, causal=True) == wanted


def test_causal_and_the_mask_both_hide(implementation):
    both_ways = boolean(["##", ".#"])
    assert picture(both_ways, 4, implementation) == ["####", "##.#"]
    assert picture(both_ways, 4, implementation, causal=True) == ["###.", "##.#"]


def test_a_window_counts_tokens_in_their_order(implementation):
    assert picture(boolean(TREE), 6, implementation, window=(3, 0)) == [
        "###...",
        "####..",
        ".##.#.",
        "..##.#",
    ]


def test_without_a_key_before_the_draft_a_row_may_see_nothing(implementation):
    assert picture(boolean(["..", "#."]), 2, implementation) == ["..", "#."]


def test_with_fewer_keys_than_tokens_the_last_tokens_are_the_keys(implementation):
    """The mask's columns for tokens that are not keys are not read."""
    assert picture(boolean(["#.#", ".##", "#.."]), 2, implementation) == [".#", "##", ".."]


@pytest.mark.parametrize("size", [2, 4])
def test_a_packed_sequence_takes_the_corner_that_it_fills(implementation, size):
    tree = boolean(TREE)[:, :size, :size]
    cu_seqlens = jnp.asarray([0, 2], jnp.int32)
    assert picture(tree, 4, implementation, tokens=2, cu_seqlens_q=cu_seqlens) == ["###.", "####"]


def test_a_packed_sequence_of_more_tokens_than_the_mask_has_no_draft(implementation):
    cu_seqlens = jnp.asarray([0, 3], jnp.int32)
    nothing = jnp.zeros((1, 2, 2), bool)
    options = dict(tokens=3, cu_seqlens_q=cu_seqlens)
    assert picture(nothing, 4, implementation, **options) == ["####"] * 3
    assert picture(nothing, 4, implementation, causal=True, **options) == ["##..", "###.", "####"]


# Numbers.

FEW = Case("few", b=4, sq=4, sk=30, kv_lengths=(25, 4, 2, 30), draft_mask=(4, 4, 4))
MIXED = varlen("mixed", (1, 7, 0, 12, 3), k_sequences=(20, 7, 5, 19, 9), padding=(3, 0), draft_mask=(5, 7, 7))
OPTIONS = [
    FEW,
    FEW.replace(name="causal", causal=True, hq=8, hk=2),
    FEW.replace(name="one mask for all", draft_mask=(1, 4, 4), hq=4, hk=1),
    FEW.replace(name="window and sinks", window=(9, 2), sinks=True),
    FEW.replace(name="softcap and alibi", softcap=3.0, alibi_slopes=(4, 4), hq=4, hk=4),
    FEW.replace(name="one token", sq=1, draft_mask=(4, 1, 1)),
    FEW.replace(name="negative scale", scale=-0.7, d=24, dv=40),
    MIXED,
    MIXED.replace(name="mixed, causal", causal=True, draft_mask=(1, 12, 12)),
    MIXED.replace(name="mixed, window", window=(8, 0), hq=8, hk=1, sinks="token"),
    MIXED.replace(name="mixed, softcap and alibi", softcap=3.0, alibi_slopes=(4,), causal=True),
]


@pytest.mark.parametrize("dtype", DTYPES)
@by_name(OPTIONS)
def test_each_option(case, dtype):
    pages.check(paged(case.replace(dtype=dtype)), IMPLEMENTATION)


@by_name(OPTIONS)
def test_each_option_in_plain_jax(case):
    pages.check(paged(case), "xla")


@pytest.mark.parametrize(("size", "layout"), [(1, "hnd"), (5, "nhd"), (16, "nhd"), (64, "hnd")])
@pytest.mark.parametrize("tokens", [8, 16, 40])
def test_trees_that_cross_tiles_and_pages(tokens, size, layout):
    """On CUDA up to 16 tokens run decode, and more run the forward; the draft begins in the middle of a key tile."""
    lengths = (300, 257, tokens, 131)
    case = Case("", b=4, sq=tokens, sk=300, kv_lengths=lengths, hq=4, hk=1, draft_mask=(4, tokens, tokens))
    pages.check(paged(case.replace(dtype="bfloat16", d=64, dv=64), size, layout), IMPLEMENTATION)


@pytest.mark.parametrize(
    ("d", "dv"), [(32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)], ids=str
)
def test_every_head_dim(d, dv):
    """Decode with 4, 16 and 32 rows per KV head, the forward, and packed batches that run both."""
    options = dict(b=2, sk=300, kv_lengths=(290, 139), hq=4, hk=1, d=d, dv=dv, dtype="bfloat16")
    for tokens in (1, 4, 8, 70):
        case = Case(f"{tokens}", sq=tokens, draft_mask=(2, tokens, tokens), **options)
        pages.check(paged(case, 16), IMPLEMENTATION)
    packed = {name: x for name, x in options.items() if name not in ("b", "sk", "kv_lengths")}
    mixed = varlen(
        "mixed", (1, 70, 4), k_sequences=(300, 90, 40), causal=True, draft_mask=(3, 4, 4), **packed
    )
    pages.check(paged(mixed, 16), IMPLEMENTATION)


@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {"draft_mask": (33, 9, 9)}, {"draft_mask": (1, 9, 9), "causal": True}],
    ids=str,
)
def test_trees_of_many_sequences(options):
    """36 rows per KV head fill whole waves of tiles, so that Hopper's forward packs heads; some rows see nothing."""
    lengths = tuple({3: 0, 7: 5, 9: 9}.get(i, 9 + i * 23 % 70) for i in range(33))
    case = Case("many", b=33, sq=9, sk=80, kv_lengths=lengths, hq=32, hk=8, d=128, dv=128, dtype="bfloat16")
    pages.check(paged(case.replace(**options), 16), IMPLEMENTATION)


def test_packed_sequences_with_and_without_a_draft_fill_waves_of_tiles():
    """More than three tiles for each CTA of Hopper's forward, which keeps the states of three."""
    tokens = tuple(12 + i * 7 % 13 for i in range(48 if IMPLEMENTATION == "cuda" else 6))
    keys = tuple(n + i * 11 % 30 for i, n in enumerate(tokens))
    case = varlen(
        "waves", tokens, k_sequences=keys, draft_mask=(len(tokens), 18, 18), hq=16, hk=4, d=64, dv=64
    )
    pages.check(paged(case.replace(dtype="bfloat16"), 16), IMPLEMENTATION)


@pytest.mark.parametrize("float8", FLOAT8)
def test_float8_pools(float8):
    case = FEW.replace(d=64, dv=64, hq=8, hk=2, sk=200, kv_lengths=(200, 70, 4, 131), dtype="bfloat16")
    pages.check(paged(case, 16, pool_dtype=float8), IMPLEMENTATION)
    pages.check(paged(MIXED.replace(causal=True), 4, "hnd", float8), IMPLEMENTATION)


@pytest.mark.parametrize("splits", [1, 2, 3, 7, 10**6])
@by_name([FEW.replace(sk=300, kv_lengths=(300, 133, 4, 2)), MIXED])
def test_any_number_of_splits(case, splits):
    pages.check(paged(case, 16), IMPLEMENTATION, num_splits=splits)


def test_batch_invariant_is_the_same_bits_alone_and_in_company(kernel):
    require(kernel)
    case = FEW.replace(sk=2200, kv_lengths=(2200, 40, 2100, 1030))
    call = paged(case, 64)
    whole = call.call(kernel, batch_invariant=True)({})
    for z in range(4):
        names = ("query", "block_tables", "kv_lengths", "draft_mask")
        one = call.call(kernel, batch_invariant=True)({n: call.arrays[n][z : z + 1] for n in names})
        for x, y in zip(one, whole, strict=True):
            np.testing.assert_array_equal(x[0], y[z])


@pytest.mark.parametrize(
    ("case", "sees_it"),
    [
        (Case("fixed", b=2, sq=4, sk=9, kv_lengths=(9, 7), draft_mask=(2, 4, 4)), [0, 1, 0, 1]),
        (varlen("causal", (4, 2), k_sequences=(9, 7), draft_mask=(2, 4, 4), causal=True), [0, 0, 0, 1]),
    ],
    ids=["fixed", "causal"],
)
def test_a_missing_page_counts_for_the_rows_that_see_a_key_there(implementation, case, sees_it):
    """Each page has one key. Missing are key 7, which is new token 2, or key 2, which all rows see."""
    require(implementation)
    call = paged(case, 1)
    mask = call.arrays["draft_mask"].at[0, :, 2].set(jnp.asarray([False, True, False, True]))
    for key, rows in ((7, sees_it), (2, [1, 1, 1, 1])):
        tables = call.arrays["block_tables"].at[0, key].set(-3)
        hit = np.zeros((2, 4) if case.layout == "fixed" else 6, bool)
        hit.reshape(-1)[:4] = rows
        got = call.call(implementation)({"block_tables": tables, "draft_mask": mask})
        pages.assert_nan_where(hit, *got)


# Derivatives and transformations.


@by_name(
    [FEW.replace(causal=True, sinks=True), FEW.replace(name="one for all", draft_mask=(1, 4, 4), softcap=3.0)]
)
def test_gradients(case):
    pages.check(paged(case, 5), IMPLEMENTATION, gradients=True)
    pages.check(paged(case, 5), "xla", gradients=True)


def test_tangents(implementation):
    require(implementation)
    call = paged(FEW, 5)
    arrays = {name: call.arrays[name] for name in ("query", "key", "value")}
    # Unused slots are NaN, which a finite difference of plain JAX's tangents may not see.
    arrays = {name: jnp.nan_to_num(x) for name, x in arrays.items()}
    moved = {name: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) for name, x in arrays.items()}
    got = jax.jvp(call.call(implementation), (arrays,), (moved,))[1]
    wanted = jax.jvp(call.call("xla"), (arrays,), (moved,))[1]
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def test_packed_queries_have_gradients_in_plain_jax_alone(kernel):
    require(kernel)
    call = paged(MIXED.replace(causal=True), 5)
    pages.check(call, "xla", gradients=True)
    with pytest.raises(
        NotImplementedError, match=r'draft_mask with cu_seqlens_q .* implementation="xla" has it'
    ):
        jax.grad(lambda q: call.call(kernel)({"query": q})[0].sum())(call.arrays["query"])


@pytest.mark.parametrize("case", [FEW, MIXED], ids=lambda case: case.name)
def test_vmap_over_masks(kernel, case):
    require(kernel)
    call = paged(case, 4)
    mask = call.arrays["draft_mask"]
    masks = jnp.stack([mask, ~mask, jnp.ones_like(mask)])
    got = jax.jit(jax.vmap(lambda x: call.call(kernel)({"draft_mask": x})))(masks)
    for i in range(3):
        for x, y in zip(got, call.call("xla")({"draft_mask": masks[i]}), strict=True):
            np.testing.assert_allclose(x[i], y, rtol=2e-5, atol=2e-5)


def test_sharded_heads_need_no_communication(kernel, axis_type):
    require(kernel)
    call = paged(FEW.replace(hq=16, hk=8), 4)
    specs = dict.fromkeys(("query", "key", "value"), P(None, None, "model"))
    program = sharded_attention(call, specs, kernel, axis_type)
    assert not collectives(program)
    assert shard_shapes(program, "forward") == {(4, 4, 2, 16)}


def test_a_sharded_mask_is_gathered(kernel, axis_type):
    require(kernel)
    call = paged(FEW, 4)
    sharded_attention(call, {"draft_mask": P("model")}, kernel, axis_type, devices=4)
