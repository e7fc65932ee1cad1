"""flash_attn's documented semantics in numpy and float64, one query row at a time, and inputs for comparisons."""

import math
from functools import partial

import numpy as np

HQ, HK, D, DV = 4, 2, 16, 8
S_MAX = 12
SLOPES = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
CU_Q, CU_K = (0, 3, 3, 8), (0, 5, 9, 12)  # lengths 3, 0, 5 and 5, 4, 3
OPTIONS = {
    "plain": {},
    "causal": dict(causal=True),
    "window": dict(window_size=(2, 1)),
    "left window": dict(window_size=(2, -1)),
    "right window": dict(window_size=(-1, 1)),
    "causal window": dict(causal=True, window_size=(3, 5)),
    "scale": dict(softmax_scale=0.7),
    "softcap": dict(softcap=1.5, causal=True),
    "alibi": dict(alibi_slopes=SLOPES),
    "alibi of each sequence": dict(alibi_slopes=np.stack([SLOPES * i for i in range(1, 4)])),
    "deterministic": dict(deterministic=True),
}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def i32(*values):
    return np.array(values, np.int32)


def attend(
    q,
    k,
    v,
    z=0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
):
    """One sequence: q [sq, hq, d], k [sk, hk, d] → out [sq, hq, dv], lse [hq, sq]."""
    (sq, hq, d), (sk, hk, _) = q.shape, k.shape
    out, lse = np.zeros((sq, hq, v.shape[-1])), np.full((hq, sq), -np.inf)
    left, right = window_size[0], 0 if causal else window_size[1]
    for i in range(sq):
        middle = i + sk - sq
        first = 0 if left < 0 else max(middle - left, 0)
        last = sk - 1 if right < 0 else min(middle + right, sk - 1)
        seen = np.arange(first, last + 1)
        for h in range(hq if len(seen) else 0):
            kv = h // (hq // hk)
            s = (
                (1 / math.sqrt(d) if softmax_scale is None else softmax_scale)
                * k[seen, kv].astype(float)
                @ q[i, h]
            )
            if softcap:
                s = softcap * np.tanh(s / softcap)
            if alibi_slopes is not None:
                s = s - np.broadcast_to(alibi_slopes, (3, hq))[z, h] * np.abs(middle - seen)
            lse[h, i] = s.max() + np.log(np.exp(s - s.max()).sum())
            out[i, h] = np.exp(s - lse[h, i]) @ v[seen, kv]
    return out, lse


def attend_batch(q, k, v, **options):
    pairs = [attend(*x, z=z, **options) for z, x in enumerate(zip(q, k, v))]
    return tuple(np.stack(x) for x in zip(*pairs))


def attend_packed(q, k, v, cu_q=CU_Q, cu_k=CU_K, **options):
    pairs = [
        attend(q[cu_q[z] : cu_q[z + 1]], k[cu_k[z] : cu_k[z + 1]], v[cu_k[z] : cu_k[z + 1]], z=z, **options)
        for z in range(len(cu_q) - 1)
    ]
    outs, lses = zip(*pairs)
    return np.concatenate(outs), np.concatenate(lses, 1)


def assert_close(got, wanted, tolerance=1e-5, size=1.0):
    """Within a part of the element and of `size`: that of the terms of sums, by a part of which float32 rounds."""
    assert np.shape(got) == np.shape(wanted)
    np.testing.assert_allclose(np.asarray(got), wanted, rtol=tolerance, atol=tolerance * size)


def slope(function, arrays, seed=9):
    """The derivative of `function` along a random direction, by central differences in float64, and that direction."""
    arrays = [x.astype(float) for x in arrays]
    along = [np.random.default_rng(seed + i).normal(size=x.shape) for i, x in enumerate(arrays)]
    ahead, behind = (function(*(x + e * u for x, u in zip(arrays, along))) for e in (1e-5, -1e-5))
    return (ahead - behind) / 2e-5, along


def rotate(x, positions, cos, sin, interleaved):
    """x [s, h, d] rotated at positions [s]."""
    x, half = x.astype(float), cos.shape[1]
    out = x.copy()
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        c, s = (t[positions, i][:, None].astype(float) for t in (cos, sin))
        out[..., a], out[..., b] = x[..., a] * c - x[..., b] * s, x[..., a] * s + x[..., b] * c
    return out


def with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None, block_table=None, rotary_interleaved=True, num_splits=0, **options,
):  # fmt: skip
    """flash_attn's documentation as a loop: (out, lse, k_cache, v_cache)."""
    caches = k_cache.astype(float), v_cache.astype(float)
    size = k_cache.shape[1]
    limited = options.get("causal", False) or options.get("window_size", (-1, -1)) != (-1, -1)

    def slot(z, position):
        if block_table is not None:
            return block_table[z, position // size], position % size
        row = z if cache_batch_idx is None else cache_batch_idx[z]
        return row, position + (0 if cache_leftpad is None else cache_leftpad[z])

    found = []
    for z in range(len(q)):
        n = size if cache_seqlens is None else int(np.broadcast_to(cache_seqlens, len(q))[z])
        first = n  # rotary positions include the padding
        n -= 0 if cache_leftpad is None else int(cache_leftpad[z])
        query = q[z].astype(float)
        if k is not None:
            new = k[z].astype(float)
            if rotary_cos is not None:
                turn = partial(rotate, cos=rotary_cos, sin=rotary_sin, interleaved=rotary_interleaved)
                new = turn(new, first + np.arange(len(new)))
                query = turn(query, first + np.arange(len(query)) * limited)
            for i in range(len(new)):
                caches[0][slot(z, n + i)], caches[1][slot(z, n + i)] = new[i], v[z, i]
            n += len(new)
        keys, values = (
            np.array([x[slot(z, j)] for j in range(n)]).reshape(n, HK, x.shape[-1]) for x in caches
        )
        found.append(attend(query, keys, values, z=z, **options))
    out, lse = (np.stack(x) for x in zip(*found))
    return out, lse, *caches
