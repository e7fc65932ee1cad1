"""append_kv(scale="dynamic"): every page's scale fits its elements, and each is stored within the float8 rounding."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import IMPLEMENTATION
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import within
from pages import FLOAT8, require
from pairwise import pairwise
from programs import collectives, custom_calls, require_devices, shard_shapes
from test_append import EMPTY, arguments, by_token, rotated, run, without
from test_paged_programs import assert_vmap_is_a_loop, copies

from jax_flash import append_kv, paged_attention

HK = 2
RELATIVE = {FLOAT8[0]: 1 / 16, FLOAT8[1]: 1 / 8}  # error of a normal number, relative to it
OF_SCALE = {FLOAT8[0]: 1 / 512, FLOAT8[1]: 1 / 65536}  # error of a subnormal one, relative to the scale


def dynamic(float8=FLOAT8[0], **options):
    """A random call on pools and scales that hold garbage, NaN among it, which a page's first token must replace."""
    call = arguments(pool_dtype=float8, **options)
    count = call["k_pages"].shape[0]
    for i, name in enumerate(("k_pages", "v_pages")):
        bits = np.random.default_rng(i).integers(0, 256, call[name].shape, np.uint8)
        call[name] = jnp.asarray(bits.view(float8))
    garbage = np.resize(np.asarray([np.nan, 1e30, 0, -1, np.inf, 1e-38], np.float32), (count, HK))
    return call | {"k_scale": jnp.asarray(garbage), "v_scale": jnp.asarray(garbage), "scale": "dynamic"}


def wide(pool, scale, layout):
    """The numbers that a pool stands for, [p, ps, hk, d]."""
    stored = np.asarray(pool).astype(np.float64)
    stored = stored if layout == "nhd" else stored.swapaxes(1, 2)
    with np.errstate(invalid="ignore"):  # some pages hold garbage
        return stored * np.asarray(scale, np.float64)[:, None, :, None]


def assert_holds(results, calls, implementation):
    """After these calls, one after the other on the same sequences, the pools hold all tokens within the bound."""
    k_pages, v_pages, _, k_scale, v_scale = results
    first = calls[0]
    layout, float8 = first["page_layout"], str(first["k_pages"].dtype)
    tables = np.asarray(first["block_tables"])
    for name, pool, scale in (("key", k_pages, k_scale), ("value", v_pages, v_scale)):
        held = wide(pool, scale, layout)
        size = held.shape[1]
        expected = {}  # (page, slot) → [hk, d]
        for call in calls:
            for z, position, row in tokens(call, name):
                expected[tables[z, position // size], position % size] = row
        largest = {}
        for (page, slot), row in expected.items():
            error = np.abs(held[page, slot] - row)
            bound = RELATIVE[float8] * np.abs(row) + OF_SCALE[float8] * np.asarray(scale)[page][:, None]
            assert (error <= bound).all(), (
                f"{name}, page {page} slot {slot}: {(error / bound).max()} of the bound"
            )
            largest[page] = np.maximum(largest.get(page, 0), np.abs(row).max(-1))
        limit = float(ml_dtypes.finfo(float8).max)
        for page, of_page in largest.items():
            wanted = np.where(of_page > 0, 2.0 ** np.ceil(np.log2(np.maximum(of_page, 1e-300) / limit)), 0)
            np.testing.assert_array_equal(np.asarray(scale)[page], np.maximum(wanted, 2.0**-100))


def tokens(call, name):
    """(sequence, position, row) of the new keys or values of a call, rotated."""
    x = {n: np.asarray(a) if hasattr(a, "shape") else a for n, a in call.items()}
    for z in range(len(x["kv_lengths"])):
        rows = x[name][z] if "cu_seqlens" not in x else x[name][x["cu_seqlens"][z] : x["cu_seqlens"][z + 1]]
        for t, row in enumerate(rows):
            position = int(x["kv_lengths"][z]) + t
            if "rotary" in x and name == "key":
                row = rotated(row, position, *map(np.asarray, x["rotary"]), x["interleaved"])
            yield z, position, row.astype(np.float64)


def after(call, results, **new):
    """The next call, on the pools, lengths and scales that the last one returned."""
    names = ("k_pages", "v_pages", "kv_lengths", "k_scale", "v_scale")
    return call | dict(zip(names, results, strict=True)) | new


NEW_PAGES = pairwise(
    {"size": [1, 4, 64], "new": [6, (1, 0, 9)], "float8": list(FLOAT8), "layout": ["nhd", "hnd"]}
)


@pytest.mark.parametrize("options", NEW_PAGES, ids=lambda options: "-".join(map(str, options.values())))
def test_new_pages(implementation, options):
    require(implementation)
    entries, new = 12 // options["size"] + 1, options["new"]
    call = dynamic(**options, entries=entries, lengths=(0, 0, 0), dtype="bfloat16")
    results = run(call, implementation)
    assert_holds(results, [call], implementation)
    assert results[2].tolist() == ([new] * 3 if isinstance(new, int) else list(new))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("float8", FLOAT8)
def test_a_page_that_grows_keeps_its_earlier_tokens(implementation, float8, dtype):
    """Token after token up to eight times larger, then smaller ones: the scale grows and never shrinks."""
    require(implementation)
    call = dynamic(float8, size=8, entries=3, new=1, lengths=(0, 0, 0), dtype=dtype)
    calls = []
    for step, power in enumerate((0, 3, 1, 4, 9, 9, 2, -6, 0, 1, 12, 0)):
        new = arguments(new=1, dtype=dtype, seed=step)
        call = call | {n: new[n] * jnp.asarray(2.0**power, dtype) for n in ("key", "value")}
        calls.append(call)
        call = after(call, run(call, implementation))
    results = [call[n] for n in ("k_pages", "v_pages", "kv_lengths", "k_scale", "v_scale")]
    assert_holds(results, calls, implementation)


def test_chunks_of_any_size_leave_the_same_scales(implementation):
    require(implementation)
    rng = np.random.default_rng(0)
    all_keys = jnp.asarray(
        rng.standard_normal((3, 12, HK, 16)) * 2.0 ** rng.integers(-3, 4, (3, 12, 1, 1)), "bfloat16"
    )
    all_values = jnp.asarray(rng.standard_normal((3, 12, HK, 8)), "bfloat16")
    found = []
    for chunks in ((12,), (5, 1, 6), (1,) * 12):
        call, calls, start = dynamic(size=5, entries=3, new=1, lengths=(0, 0, 0), dtype="bfloat16"), [], 0
        for count in chunks:
            call = call | {
                "key": all_keys[:, start : start + count],
                "value": all_values[:, start : start + count],
            }
            calls.append(call)
            call = after(call, run(call, implementation))
            start += count
        results = [call[n] for n in ("k_pages", "v_pages", "kv_lengths", "k_scale", "v_scale")]
        assert_holds(results, calls, implementation)
        used = np.asarray(call["block_tables"])
        found.append([np.asarray(x)[used] for x in results[3:]])
    for other in found[1:]:
        for x, y in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("turned", [16, 6])
def test_with_rotary(implementation, turned, interleaved):
    """The largest element is that of the rotated keys."""
    require(implementation)
    call = dynamic(new=(3, 2, 4), lengths=(0, 0, 0), positions=13, interleaved=interleaved, rotated=turned)
    assert_holds(run(call, implementation), [call], implementation)


def test_the_kernels_give_the_bits_of_plain_jax(kernel):
    require(kernel)
    call = dynamic(size=4, new=(5, 2, 9), lengths=(0, 0, 0), dtype="bfloat16")
    wanted, got = run(call, "xla"), run(call, kernel)
    more = arguments(new=(2, 3, 1), dtype="bfloat16", seed=5)
    more = {n: more[n] * 8 if n in ("key", "value") else more[n] for n in ("key", "value", "cu_seqlens")}
    wanted, got = (run(after(call, x, **more), i) for x, i in ((wanted, "xla"), (got, kernel)))
    written = np.asarray(call["block_tables"])[:, :2]
    for x, y in zip(got[:2], wanted[:2], strict=True):
        used = np.zeros(x.shape[:2], bool)
        for z, count in enumerate((7, 5, 10)):
            for position in range(count):
                used[np.asarray(call["block_tables"])[z, position // 4], position % 4] = True
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8)[used], np.asarray(y).view(np.uint8)[used])
    for x, y in zip(got[3:], wanted[3:], strict=True):
        np.testing.assert_array_equal(np.asarray(x)[written], np.asarray(y)[written])


def test_pages_that_are_not_written_keep_their_bits_and_scales(implementation):
    require(implementation)
    call = dynamic(size=4, new=3, lengths=(3, 0, 11), dtype="bfloat16")
    results = run(call, implementation)
    tables = np.asarray(call["block_tables"])
    written = {tables[0, 0], tables[0, 1], tables[1, 0], tables[2, 2], tables[2, 3]}
    others = [p for p in range(call["k_pages"].shape[0]) if p not in written]
    for name, x in zip(("k_pages", "v_pages", "kv_lengths", "k_scale", "v_scale"), results, strict=True):
        if name != "kv_lengths":
            assert np.asarray(x)[others].tobytes() == np.asarray(call[name])[others].tobytes(), name
    for page, slots in ((tables[1, 0], [3]), (tables[0, 0], []), (tables[2, 3], [2, 3])):
        for name, x in zip(("k_pages", "v_pages"), results, strict=False):
            mine = np.asarray(x)[page, slots].tobytes()
            assert mine == np.asarray(call[name])[page, slots].tobytes(), "a slot behind the last token"


def test_zeros_infinities_and_nan(implementation):
    """A page of zeros has the smallest scale; infinities saturate, NaN stays, and neither decides about a scale."""
    require(implementation)
    call = dynamic(size=4, new=2, lengths=(0, 0, 0))
    key = np.zeros_like(call["key"])
    key[1, 0, 0, :3], key[1, 1, 0, 0] = (np.inf, -np.inf, np.nan), 3
    k_pages, _, _, k_scale, _ = run(call | {"key": jnp.asarray(key)}, implementation)
    tables = np.asarray(call["block_tables"])
    assert np.asarray(k_scale)[tables[0, 0]].tolist() == [2.0**-100] * HK
    page, scale = np.asarray(k_pages)[tables[1, 0]].astype(np.float32), np.asarray(k_scale)[tables[1, 0], 0]
    assert scale == 2.0**-7  # 3 / 448
    assert page[0, 0, :2].tolist() == [448, -448]
    assert np.isnan(page[0, 0, 2])
    assert page[1, 0, 0] * scale == 3
    assert np.isfinite(page[:2]).sum() == page[:2].size - 1


@pytest.mark.parametrize("scale", [0.0, -0.0, -1.0, np.inf, -np.inf, np.nan])
def test_a_page_whose_scale_cannot_be_one_keeps_nothing(implementation, scale):
    """If a page's old scale is no positive number, new tokens alone decide its scale, and old tokens become zeros."""
    require(implementation)
    call = dynamic(size=4, new=2, lengths=(1, 2, 2))
    names = {"k_pages": "key", "v_pages": "value"}
    held = {name: jnp.ones_like(call[name]) for name in names}
    scales = {name: jnp.full_like(call[name], scale) for name in ("k_scale", "v_scale")}
    k_pages, v_pages, _, k_scale, v_scale = run(call | held | scales, implementation)
    for name, pool, found in (("key", k_pages, k_scale), ("value", v_pages, v_scale)):
        for z, page in enumerate(np.asarray(call["block_tables"])[:, 0]):
            before = int(call["kv_lengths"][z])
            new = np.asarray(call[name], np.float64)[z]  # [2, hk, d]
            wanted = 2.0 ** np.ceil(np.log2(np.abs(new).max((0, 2)) / 448))
            np.testing.assert_array_equal(np.asarray(found)[page], wanted)
            here = wide(pool, found, "nhd")[page]
            assert (here[:before] == 0).all(), name
            error = np.abs(here[before : before + 2] - new)
            assert (error <= np.abs(new) / 16 + wanted[:, None] / 512).all(), name


@pytest.mark.parametrize(
    "largest", [448.0, 448.0 * (1 + 2**-22), 447.9, 2.0**-95, 3e38, 1e-45, 1.0, 1.75, 1.76]
)
def test_the_scale_is_the_smallest_power_of_two(implementation, largest):
    require(implementation)
    call = dynamic(size=4, new=1, lengths=(0, 0, 0))
    value = jnp.zeros_like(call["value"]).at[..., 0].set(largest)
    *_, v_scale = run(call | {"value": value}, implementation)
    scale = float(np.asarray(v_scale)[np.asarray(call["block_tables"])[0, 0], 0])
    x = float(np.float32(largest))
    assert scale == max(2.0 ** np.ceil(np.log2(x / 448)), 2.0**-100)


@pytest.mark.parametrize("empty", EMPTY)
def test_sizes_of_zero(implementation, empty):
    require(implementation)
    call = without(empty, dynamic(new=2))
    results = run(call, implementation)
    for name, x in zip(("k_pages", "v_pages"), results, strict=False):
        assert np.asarray(x).tobytes() == np.asarray(call[name]).tobytes()
    assert results[2].shape == call["kv_lengths"].shape


def test_random_indices_are_no_race_and_leave_no_garbage(kernel):
    """Tables, lengths and offsets of random bits: the same bits at every call, and nothing is read out of bounds."""
    require(kernel)
    rng = np.random.default_rng(0)
    for _ in range(10):
        call = dynamic(new=(2, 3, 4), size=3)
        for name, shape in (("block_tables", (3, 5)), ("kv_lengths", (3,)), ("cu_seqlens", (4,))):
            call[name] = jnp.asarray(
                rng.integers(-(2**31), 2**31, shape) >> int(rng.integers(0, 31)), jnp.int32
            )
        first, second = run(call, kernel), run(call, kernel)
        for x, y in zip(first, second, strict=True):
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


# Under JAX's transformations.


def decode_loop(implementation, steps=6):
    """Tokens of growing size: append, then attend."""

    def step(state, power):
        k_pages, v_pages, k_scale, v_scale, lengths, x = state
        new = (x * 2.0**power).astype(x.dtype)
        k_pages, v_pages, lengths, k_scale, v_scale = append_kv(
            k_pages, v_pages, new, -new, TABLES, lengths, k_scale=k_scale, v_scale=v_scale, scale="dynamic",
            implementation=implementation,
        )  # fmt: skip
        out = paged_attention(
            jnp.stack([x, x], 3).reshape(2, 1, 16, 16), k_pages, v_pages, TABLES, lengths,
            k_scale=k_scale, v_scale=v_scale, implementation=implementation,
        )  # fmt: skip
        return (k_pages, v_pages, k_scale, v_scale, lengths, x), out

    return lambda *state: jax.lax.scan(step, state, jnp.arange(steps, dtype=jnp.float32))


TABLES = jnp.asarray([[3, 9, 0], [1, 10, 5]], jnp.int32)
POOL = (11, 4, 8, 16)


def initial():
    pools = [jnp.zeros(POOL, FLOAT8[0]) for _ in "kv"]
    scales = [jnp.ones((11, 8), jnp.float32) for _ in "kv"]
    x = jax.random.normal(jax.random.key(0), (2, 1, 8, 16), jnp.float32)
    return *pools, *scales, jnp.zeros(2, jnp.int32), x


def test_a_donated_loop_copies_no_pool(kernel):
    require(kernel)
    program = jax.jit(decode_loop(kernel), donate_argnums=(0, 1, 2, 3)).lower(*initial()).compile()
    text = program.as_text()
    assert custom_calls(text) == {"append_dynamic": 1, "forward": 1}
    assert not copies(text, POOL)
    assert not copies(text, (11, 8))  # the scales, f32[p, hk]
    state = initial()
    before = [x.unsafe_buffer_pointer() for x in state[:4]]
    got, outs = program(*state)
    assert [x.unsafe_buffer_pointer() for x in got[:4]] == before
    wanted, right = jax.jit(decode_loop("xla"))(*initial())
    np.testing.assert_allclose(outs, right, rtol=1e-4, atol=1e-4)
    for x, y in zip(got[2:5], wanted[2:5], strict=True):
        np.testing.assert_array_equal(x, y)


def test_what_is_given_is_left_alone_unless_donated(implementation):
    require(implementation)
    call = dynamic()
    before = {n: np.asarray(call[n]).tobytes() for n in ("k_pages", "v_pages", "k_scale", "v_scale")}
    run(call, implementation)
    assert before == {n: np.asarray(call[n]).tobytes() for n in before}


def test_sharded_by_heads_it_needs_no_communication(kernel, axis_type):
    require(kernel)
    require_devices(8)
    mesh = jax.make_mesh((8,), ("model",), (axis_type,))
    heads, by_page, whole = (NamedSharding(mesh, s) for s in (P(None, None, "model"), P(None, "model"), P()))
    where = heads, heads, by_page, by_page, whole, heads
    state = [jax.device_put(x, s) for x, s in zip(initial(), where, strict=True)]
    with within(mesh):
        program = jax.jit(decode_loop(kernel), donate_argnums=(0, 1, 2, 3)).lower(*state).compile()
    text = program.as_text()
    assert not collectives(text)
    assert shard_shapes(text, "append_dynamic") == {(11, 4, 1, 16)}
    (got, outs), (wanted, right) = program(*state), jax.jit(decode_loop("xla"))(*initial())
    np.testing.assert_allclose(outs, right, rtol=1e-4, atol=1e-4)
    for x, y in zip(got[2:5], wanted[2:5], strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    "mapped", [("k_scale",), ("key",), ("k_pages", "v_scale", "kv_lengths")], ids="-".join
)
def test_vmap(kernel, mapped):
    require(kernel)
    assert_vmap_is_a_loop(
        [dynamic(seed=seed, new=2, lengths=(seed, 3, 0)) for seed in range(3)], mapped, kernel
    )


def test_it_has_no_derivative(kernel):
    require(kernel)
    call = dynamic()
    with pytest.raises(NotImplementedError, match="append_kv: there is no derivative"):
        jax.grad(lambda key: run(call | {"key": key}, kernel)[3].sum())(call["key"])


def test_static_by_page_gives_what_dynamic_found(implementation):
    """The scales that come out, given to a static call on the same tokens, give the same bits."""
    require(implementation)
    call = dynamic(new=4, lengths=(0, 0, 0), dtype="bfloat16", size=4)
    *pools, _, k_scale, v_scale = run(call, implementation)
    fixed = {n: x for n, x in call.items() if n != "scale"} | {"k_scale": k_scale, "v_scale": v_scale}
    again = by_token(fixed)
    tables = np.asarray(call["block_tables"])[:, 0]
    for x, y in zip(pools, again, strict=False):
        assert np.asarray(x)[tables].tobytes() == np.asarray(y)[tables].tobytes()


@pytest.mark.skipif(IMPLEMENTATION != "cpu", reason="a promise of the CPU kernels")
def test_the_last_token_of_a_shared_slot_stays():
    call = dynamic(new=2, lengths=(0, 0, 0), size=4)
    call["block_tables"] = jnp.zeros_like(call["block_tables"])
    for _ in range(3):
        results = run(call, "cpu")
        page = wide(results[0], results[3], "nhd")[0]
        np.testing.assert_allclose(page[:2], np.asarray(call["key"], np.float64)[2], atol=0.3)
