"""append_kv writes every new token to its slot, bit for bit, and nothing else: against numpy, token by token."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cases import DTYPES, cu_seqlens
from conftest import IMPLEMENTATION
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from pages import FLOAT8, GARBAGE, require
from programs import require_devices

from jax_flash import append_kv, apply_rotary, flash_attention, paged_attention

N, HK, D, DV = 3, 2, 16, 8


def arguments(
    *, size=4, entries=5, layout="nhd", dtype="float32", pool_dtype=None, lengths=(3, 0, 11), new=4, positions=None,
    interleaved=False, rotated=None, seed=0, heads=HK, d=D, dv=DV,
):  # fmt: skip
    """A random call. `new`: new tokens per sequence, or a tuple with each sequence's number (packed, with padding)."""
    rng = np.random.default_rng(seed)
    pages = N * entries + 2
    rows = (N, new) if isinstance(new, int) else (sum(new) + 2,)

    def normal(*shape, dtype=dtype):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    def pool(width):
        shape = (pages, size, heads, width) if layout == "nhd" else (pages, heads, size, width)
        return normal(*shape, dtype=pool_dtype or dtype)

    made = dict(
        k_pages=pool(d), v_pages=pool(dv), key=normal(*rows, heads, d), value=normal(*rows, heads, dv),
        block_tables=jnp.asarray(rng.permutation(pages)[: N * entries].reshape(N, entries), jnp.int32),
        kv_lengths=jnp.asarray(lengths, jnp.int32), page_layout=layout,
    )  # fmt: skip
    if not isinstance(new, int):
        made["cu_seqlens"] = cu_seqlens(new)
    if positions:
        angles = rng.uniform(0, 6, (positions, (rotated or d) // 2))
        made["rotary"] = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
        made["interleaved"] = interleaved
    return made


def test_explicit_axes_outside_jit_take_indices_of_one_device(implementation):
    """Pools on a mesh that is not set, tables and lengths as numpy made them."""
    require(implementation)
    require_devices(2)
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(AxisType.Explicit,))
    call = arguments()
    spread = {
        name: jax.device_put(call[name], NamedSharding(mesh, P(None, None, "heads")))
        for name in ("k_pages", "v_pages", "key", "value")
    }
    got = append_kv(**call | spread, implementation=implementation)
    assert got[0].sharding.spec == P(None, None, "heads", None)
    for x, y in zip(got, append_kv(**call, implementation=implementation), strict=True):
        np.testing.assert_array_equal(x, y)


EMPTY = {
    "sequences": ("key", "value", "block_tables", "kv_lengths"),
    "tokens": ("key", "value"),
    "entries": ("block_tables",),
    "pages": ("k_pages", "v_pages", "k_scale", "v_scale"),
}


def without(empty, call):
    """The call with arrays of size 0: no tokens, entries, … as `empty` names."""
    cut = (slice(None), slice(0)) if empty in ("tokens", "entries") else slice(0)
    return call | {name: call[name][cut] for name in EMPTY[empty] if name in call}


def by_token(call):
    """The contract in numpy: the pools and lengths after the call."""
    x = {name: np.asarray(a) if hasattr(a, "shape") else a for name, a in call.items()}
    pools = [x["k_pages"].copy(), x["v_pages"].copy()]
    heads_first = x.get("page_layout") == "hnd"
    count, size = x["k_pages"].shape[0], x["k_pages"].shape[2 if heads_first else 1]
    n, entries = x["block_tables"].shape
    capacity, after = entries * size, []
    for z in range(n):
        length = min(max(int(x["kv_lengths"][z]), 0), capacity)
        written = 0
        for t, (key, value) in enumerate(
            zip(*(new_rows(x, name, z) for name in ("key", "value")), strict=True)
        ):
            position = length + t
            page = int(x["block_tables"][z, position // size]) if position < capacity else -1
            if not 0 <= page < count:
                continue
            written += 1
            if "rotary" in x:
                key = rotated(key, position, *map(np.asarray, x["rotary"]), x["interleaved"])
            for pool, row, scale in zip(pools, (key, value), ("k_scale", "v_scale"), strict=True):
                slot = (page, slice(None), position % size) if heads_first else (page, position % size)
                by_head = x.get(scale) if np.ndim(x.get(scale)) < 2 else x[scale][page]
                pool[slot] = quantised(row, by_head, pool.dtype) if pool.dtype in FLOAT8 else row
        after.append(length + written)
    return *pools, np.asarray(after, np.int32)


def run(call, implementation):
    """Calls append_kv, with "xla" under jit: one program compiles sooner than its operations one by one."""
    return (_in_plain_jax if implementation == "xla" else append_kv)(**call, implementation=implementation)


_in_plain_jax = jax.jit(append_kv, static_argnames=("page_layout", "interleaved", "scale", "implementation"))


def new_rows(x, name, z):
    if "cu_seqlens" not in x:
        return x[name][z]
    starts = np.maximum.accumulate(np.clip(x["cu_seqlens"], 0, x[name].shape[0]))
    return x[name][starts[z] : starts[z + 1]]


def rotated(key, position, cos, sin, interleaved):
    pairs = cos.shape[1]
    row = min(position, cos.shape[0] - 1)
    wide, turned = key.astype(np.float64), key.astype(np.float64)
    for i in range(pairs):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
        turned[:, a] = wide[:, a] * cos[row, i] - wide[:, b] * sin[row, i]
        turned[:, b] = wide[:, b] * cos[row, i] + wide[:, a] * sin[row, i]
    return turned.astype(key.dtype)


def quantised(row, scale, dtype):
    wide = row.astype(np.float32) / (1 if scale is None else scale[:, None])
    largest = float(ml_dtypes.finfo(dtype).max)
    return np.clip(wide, -largest, largest).astype(dtype)


def check(call, implementation):
    """Compares append_kv with by_token(), bit for bit."""
    got = run(call, implementation)
    for name, x, y in zip(("k_pages", "v_pages", "kv_lengths"), got, by_token(call), strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert np.asarray(x).tobytes() == y.tobytes(), f"{name} differs: {slots_that_differ(call, x, y)}"
    return got


def slots_that_differ(call, x, y):
    """Names where x and y differ: "page 3 slot 1, …" for pools, "sequence 0, …" for lengths."""
    x, y = (np.asarray(a) for a in (x, y))
    other = x.view(f"u{x.dtype.itemsize}") != y.view(f"u{y.dtype.itemsize}")
    if other.ndim == 1:
        return ", ".join(f"sequence {z}" for z in np.flatnonzero(other))
    places = np.argwhere(other.any((1, 3) if call.get("page_layout") == "hnd" else (2, 3)))
    return ", ".join(f"page {page} slot {slot}" for page, slot in places[:6]) + f" ({len(places)} slots)"


# Where tokens go.


@pytest.mark.parametrize("layout", ["nhd", "hnd"])
@pytest.mark.parametrize("new", [1, 6, (1, 0, 7)], ids=str)
@pytest.mark.parametrize("size", [1, 5, 8, 256])
def test_tokens_go_to_the_slots_after_their_length(size, new, layout):
    require(IMPLEMENTATION)
    lengths = (0, 3, 2 * size - 1)
    check(
        arguments(size=size, entries=-(-10 // size) + 2, layout=layout, new=new, lengths=lengths),
        IMPLEMENTATION,
    )


# On sm_90, warps copy tokens of 2 KB and more; with MANY tokens a warp copies several.
WIDE = dict(heads=24, d=128, dv=64, size=16, entries=60)
MANY = (500, 940, 900) if IMPLEMENTATION == "cuda" else (2, 9, 7)


@pytest.mark.parametrize("layout", ["nhd", "hnd"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("new", [MANY[1], MANY], ids=["of equal numbers", "packed"])
def test_many_tokens_of_many_bytes(new, dtype, layout):
    require(IMPLEMENTATION)
    heads = 12 if dtype == "float32" else 24
    check(arguments(**WIDE | {"heads": heads}, dtype=dtype, new=new, layout=layout), IMPLEMENTATION)


def test_threads_append_tokens_of_other_sizes_in_turn():
    """How much shared memory a kernel may use holds for all threads, and on Hopper a token's size decides it."""
    large, small = (arguments(**WIDE | {"heads": heads}, new=MANY[1], dtype="bfloat16") for heads in (24, 8))
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        for thread, call in ((one, large), (other, small), (one, large)):
            thread.submit(check, call, IMPLEMENTATION).result()


def test_many_tokens_of_a_latent_pool():
    require(IMPLEMENTATION)
    call = arguments(heads=4, d=576, size=16, entries=60, dtype="bfloat16", new=MANY)
    wanted, _, _ = by_token(call)
    got, _, _ = run(call | {"v_pages": None, "value": None}, IMPLEMENTATION)
    assert np.asarray(got).tobytes() == wanted.tobytes()


@pytest.mark.parametrize(
    "new", [1, MANY[0], MANY, (1, 0, 2)], ids=["one", "of equal numbers", "packed", "few"]
)
def test_of_many_bytes_the_last_token_of_a_slot_stays(new):
    require(IMPLEMENTATION)
    call = arguments(**WIDE, dtype="bfloat16", new=new, lengths=(3, 3, 19))
    table = call["block_tables"]
    check(call | {"block_tables": table.at[1].set(table[0]).at[2, 4].set(-1)}, IMPLEMENTATION)


@pytest.mark.parametrize("turned", [128, 48])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dtype", "heads"), [("bfloat16", 24), ("float16", 8), ("float32", 8)])
def test_keys_of_many_bytes_are_rotated(dtype, heads, interleaved, turned):
    require(IMPLEMENTATION)
    call = arguments(
        **WIDE | {"heads": heads},
        dtype=dtype,
        new=MANY,
        positions=400,
        rotated=turned,
        interleaved=interleaved,
    )
    unit = {"float32": 2e-6, "bfloat16": 2**-7, "float16": 2**-10}[dtype]
    for x, y in zip(run(call, IMPLEMENTATION), by_token(call), strict=True):
        wanted = np.asarray(y, np.float64)
        np.testing.assert_allclose(np.asarray(x, np.float64), wanted, rtol=unit, atol=unit * 2**-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("new", [2, (1, 0, 7)], ids=str)
def test_in_every_dtype(implementation, dtype, new):
    require(implementation)
    check(arguments(dtype=dtype, new=new), implementation)


@pytest.mark.parametrize("lengths", [(20, 19, 18), (-5, 2**31 - 1, -(2**31)), (17, 0, 21)], ids=str)
def test_what_passes_the_capacity_is_dropped_and_not_counted(implementation, lengths):
    """Five pages of four: 20 positions."""
    require(implementation)
    _, _, after = check(arguments(lengths=lengths), implementation)
    before = np.clip(np.asarray(lengths), 0, 20)
    assert np.array_equal(after, np.minimum(before + 4, 20))


def test_a_table_of_more_positions_than_an_int32_counts(kernel):
    require(kernel)
    pool = jnp.zeros((3, 4096, 1, 8), jnp.float32)
    tables = jnp.full((1, 2**20), 99, jnp.int32).at[0, 1].set(2)
    new = jnp.ones((1, 2, 1, 8), jnp.float32)
    k_pages, _, after = append_kv(
        pool, pool, new, new, tables, jnp.full(1, 5000, jnp.int32), implementation=kernel
    )
    assert after[0] == 5002
    assert np.argwhere(np.asarray(k_pages[..., 0, 0])).tolist() == [[2, 5000 - 4096], [2, 5001 - 4096]]


@pytest.mark.parametrize("page", [*GARBAGE, 17])
@pytest.mark.parametrize("new", [6, (1, 7, 6)], ids=str)
def test_what_goes_to_a_page_outside_the_pool_is_dropped_and_not_counted(implementation, page, new):
    """Sequence 1 loses positions 4 to 7: two or three of its tokens."""
    require(implementation)
    call = arguments(new=new, lengths=(0, 0, 11))
    call["block_tables"] = call["block_tables"].at[1, 1].set(page)
    _, _, after = check(call, implementation)
    assert after[1] == 4


def test_unused_entries_are_not_read(implementation):
    require(implementation)
    # The sequences need entries 0 and 1, entry 0, and entries 2 and 3 of their tables.
    call = arguments(lengths=(3, 0, 11), new=3)
    garbage = np.resize(np.asarray(GARBAGE, np.int32), (N, 5))
    needed = np.asarray([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 1, 1, 0]], bool)
    call["block_tables"] = jnp.where(needed, call["block_tables"], garbage)
    check(call, implementation)


@pytest.mark.parametrize("offsets", [(-3, 4, 2, 99), (2, 5, 3, 9)], ids=str)
def test_offsets_are_read_as_their_running_maximum(implementation, offsets):
    """Tokens in front of the first one are padding, too."""
    require(implementation)
    call = arguments(new=(2, 3, 4))
    call["cu_seqlens"] = jnp.asarray(offsets, jnp.int32)
    check(call, implementation)


def test_two_sequences_that_write_one_slot_leave_the_last_token(kernel):
    """Garbage tables are no race: the order of the tokens decides, every time."""
    require(kernel)
    for new in (5, (1, 4, 3)):
        call = arguments(new=new, lengths=(0, 2, 1), size=3)
        call["block_tables"] = jnp.zeros_like(call["block_tables"])
        for _ in range(5):
            check(call, kernel)


@pytest.mark.parametrize("empty", EMPTY)
def test_sizes_of_zero(implementation, empty):
    require(implementation)
    check(without(empty, arguments(new=2)), implementation)


def test_packed_tokens_of_no_sequence_are_not_written(implementation):
    require(implementation)
    call = arguments(new=2)
    packed = {name: call[name].reshape(-1, *call[name].shape[2:]) for name in ("key", "value")}
    offsets = jnp.zeros(len(call["kv_lengths"]) + 1, jnp.int32)
    check(call | packed | {"cu_seqlens": offsets}, implementation)


def test_the_pools_given_are_left_alone_unless_donated(implementation):
    require(implementation)
    call = arguments()
    before = [np.asarray(call[name]).copy() for name in ("k_pages", "v_pages")]
    append_kv(**call, implementation=implementation)
    for name, x in zip(("k_pages", "v_pages"), before, strict=True):
        assert np.array_equal(call[name], x)


# Rotary.


@pytest.mark.parametrize(
    ("dtype", "pool_dtype"),
    [("float32", None), ("bfloat16", None), ("float16", None), ("float32", FLOAT8[0])],
)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("turned", [D, 6])
def test_keys_are_rotated_by_their_position(implementation, interleaved, turned, dtype, pool_dtype):
    """Keys agree to one unit in the last place; positions past the tables use the last row."""
    require(implementation)
    call = arguments(
        dtype=dtype,
        pool_dtype=pool_dtype,
        new=(3, 2, 4),
        positions=13,
        interleaved=interleaved,
        rotated=turned,
    )
    got, wanted = run(call, implementation), by_token(call)
    unit = {"float32": 2e-6, "bfloat16": 2**-7, "float16": 2**-10}[dtype] if pool_dtype is None else 2**-2
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(
            np.asarray(x, np.float64), y.astype(np.float64), rtol=unit, atol=unit * 2**-2
        )


def test_appended_rotation_is_apply_rotarys(kernel):
    require(kernel)
    call = arguments(positions=40, dtype="bfloat16", lengths=(5, 0, 2))
    fused, _, _ = append_kv(**call, implementation=kernel)
    positions = call["kv_lengths"][:, None] + jnp.arange(4, dtype=jnp.int32)
    key = apply_rotary(call["key"], positions, *call.pop("rotary"), interleaved=call.pop("interleaved"))
    apart, _, _ = append_kv(**call | {"key": key}, implementation=kernel)
    np.testing.assert_allclose(
        np.asarray(fused, np.float32), np.asarray(apart, np.float32), rtol=2**-7, atol=2**-8
    )


def test_interleaved_has_no_effect_without_rotary(kernel):
    require(kernel)
    append = jax.jit(append_kv, static_argnames=("page_layout", "interleaved", "implementation"))
    plain, other = (append.lower(**arguments(), interleaved=i, implementation=kernel) for i in (False, True))
    assert plain.as_text() == other.as_text()


# Together with attention.


@pytest.mark.parametrize("chunks", [(12,), (5, 1, 6), (1,) * 12], ids=str)
def test_a_cache_filled_in_chunks_attends_as_one_call(implementation, chunks):
    """Each chunk's queries see the chunks before and, causally, their own."""
    require(implementation)
    rng = np.random.default_rng(0)
    key, value, query = (jnp.asarray(rng.standard_normal((2, 12, h, D)), jnp.float32) for h in (HK, HK, 4))
    k_pages, v_pages = (jnp.full((6, 5, HK, D), jnp.nan, jnp.float32) for _ in range(2))
    tables = jnp.asarray([[4, 0, 2], [1, 5, 3]], jnp.int32)
    lengths, outs, start = jnp.zeros(2, jnp.int32), [], 0
    for size in chunks:
        chunk = slice(start, start + size)
        k_pages, v_pages, lengths = append_kv(
            k_pages, v_pages, key[:, chunk], value[:, chunk], tables, lengths, implementation=implementation
        )
        outs.append(
            paged_attention(
                query[:, chunk], k_pages, v_pages, tables, lengths, causal=True, implementation=implementation
            )
        )
        start += size
    assert np.array_equal(lengths, [12, 12])
    wanted = flash_attention(query, key, value, causal=True, implementation="xla")
    np.testing.assert_allclose(jnp.concatenate(outs, 1), wanted, rtol=1e-5, atol=1e-5)
