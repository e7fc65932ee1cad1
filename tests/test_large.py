"""Operands of more than 2**31 elements: elements beyond that offset are read and written like those before it.

Short windows keep it cheap: a row depends on its neighbours alone, so the oracle takes pieces of the sequence.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import Case, Inputs, cu_seqlens
from conftest import IMPLEMENTATION

from jax_flash import append_kv, flash_attention, flash_attention_varlen, paged_attention

pytestmark = pytest.mark.skipif(
    IMPLEMENTATION != "cuda", reason="takes 60 GB; the CPU's is in tests/kernels/guards"
)

HEADS, D, WINDOW = 64, 128, 100
TOKENS = 2**31 // (HEADS * D) + 5000
PIECE = 4 * WINDOW
CROSSING = 2**31 // (HEADS * D) - 2 * WINDOW  # the first token of a piece that has offset 2**31 in its middle


def require_memory(gigabytes):
    limit = jax.devices()[0].memory_stats()["bytes_limit"]
    if limit < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of GPU memory, has {limit / 1e9:.0f}")


def normal(seed, *shape):
    return jax.jit(lambda: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16))()


def attend(query, key, value, starts):
    """[tokens, heads, d], one sequence or, with starts, packed ones."""
    options = {"window": (WINDOW, 0), "implementation": IMPLEMENTATION}
    if starts is None:
        return flash_attention(query[None], key[None], value[None], **options)[0]
    return flash_attention_varlen(query, key, value, starts, starts, deterministic=True, **options)


@pytest.mark.parametrize("lengths", [None, (1000, TOKENS - 2000, 900)], ids=["fixed", "packed"])
def test_forward_and_backward_beyond_2_31_elements(lengths):
    """In one sequence, a row's offset must overflow 32 bits."""
    require_memory(60)
    arrays = [normal(seed, TOKENS, HEADS, D) for seed in range(4)]
    starts = None if lengths is None else cu_seqlens(lengths)

    @jax.jit
    def run(query, key, value, dout):
        out, pullback = jax.vjp(lambda *x: attend(*x, starts), query, key, value)
        return out, *pullback(dout)

    results = run(*arrays)
    begin, end = (0, TOKENS) if lengths is None else (lengths[0], sum(lengths[:2]))
    for first in (begin, CROSSING, end - PIECE):
        check_piece(arrays, results, first, whole=(first == begin, first == end - PIECE))


def check_piece(arrays, results, first, whole):
    """Compares the first and last head. Rows and keys with neighbours outside the piece are left out, except at an end
    of the whole."""
    piece = np.s_[first : first + PIECE, :: HEADS - 1]
    query, key, value, dout = (np.asarray(x[piece])[None] for x in arrays)
    inputs = Inputs(
        {"query": query, "key": key, "value": value}, {}, dout, np.zeros((1, 2, PIECE), np.float32)
    )
    case = Case("piece", b=1, sq=PIECE, sk=PIECE, hq=2, hk=2, d=D, dv=D, dtype="bfloat16", window=(WINDOW, 0))
    right, low = oracle.on_cpu(oracle.references)(case, inputs)
    before = 0 if whole[0] else WINDOW
    rows, keys = np.s_[:, before:], np.s_[:, before : PIECE if whole[1] else PIECE - WINDOW]
    out, *gradients = (np.asarray(x[piece])[None] for x in results)
    oracle.assert_out(out[rows], right.out[rows], low.out[rows])
    for name, gradient, inner in zip(("query", "key", "value"), gradients, (rows, keys, keys), strict=True):
        x, y = (z.gradients[name][inner] for z in (right, low))
        oracle.assert_gradient(name, gradient[inner], x, y)


# ---- pools

SLOTS, KV_HEADS = 16, 8
PAGES = 2**31 // (SLOTS * KV_HEADS * D) + 1001
LENGTHS = (1000, 17, 0, 650)


def make_tables():
    """Random pages for the sequences of LENGTHS, each used once; the pool's last page is among them."""
    pages = np.random.default_rng(0).permutation(PAGES)
    pages[0] = PAGES - 1
    return jnp.asarray(pages[: len(LENGTHS) * 64].reshape(len(LENGTHS), 64), jnp.int32)


def gather(pool, tables):
    """The keys of every sequence, [n, 64 · SLOTS, h, d]."""
    return np.array(pool[tables]).reshape(len(LENGTHS), 64 * SLOTS, KV_HEADS, D)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_a_pool_beyond_2_31_elements(dtype):
    """Decode, a prefill with more rows than decode takes, and appended tokens."""
    require_memory(40)
    tables, lengths = make_tables(), jnp.asarray(LENGTHS, jnp.int32)
    assert (np.asarray(tables) > PAGES - 1000).any()
    k_pages, v_pages = (normal(seed, PAGES, SLOTS, KV_HEADS, D).astype(dtype) for seed in range(2))
    new = [normal(seed, len(LENGTHS), 20, KV_HEADS, D) for seed in (2, 3)]
    before = [gather(pool, tables) for pool in (k_pages, v_pages)]
    append = jax.jit(
        lambda *x: append_kv(*x, tables, lengths, implementation=IMPLEMENTATION), donate_argnums=(0, 1)
    )
    k_pages, v_pages, lengths = append(k_pages, v_pages, *new)
    after = [gather(pool, tables) for pool in (k_pages, v_pages)]
    for x, y, tokens in zip(before, after, new, strict=True):
        for z, length in enumerate(LENGTHS):
            x[z, length : length + 20] = np.asarray(tokens[z].astype(dtype))
        assert x.tobytes() == y.tobytes()
    for sq in (1, 100):
        check_paged(sq, k_pages, v_pages, after, tables, lengths)


def check_paged(sq, k_pages, v_pages, keys_and_values, tables, lengths):
    case = Case("pool", b=len(LENGTHS), sq=sq, sk=64 * SLOTS, hq=16, hk=KV_HEADS, d=D, dv=D, dtype="bfloat16",
                causal=True, kv_lengths=tuple(map(int, lengths)))  # fmt: skip
    query = normal(4, len(LENGTHS), sq, 16, D)
    out, lse = paged_attention(
        query, k_pages, v_pages, tables, lengths, causal=True, return_lse=True, implementation=IMPLEMENTATION
    )
    key, value = (x.astype("bfloat16") for x in keys_and_values)
    inputs = Inputs(
        {"query": np.asarray(query), "key": key, "value": value},
        {"kv_lengths": np.asarray(lengths)},
        np.zeros(out.shape, "bfloat16"),
        np.zeros(lse.shape, np.float32),
    )
    right, low = oracle.on_cpu(oracle.references)(case, inputs)
    oracle.assert_out(np.asarray(out), right.out, low.out)
    oracle.assert_lse(np.asarray(lse), right.lse)
