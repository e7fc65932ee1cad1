"""Attention with a boolean mask in numpy and float64; tests compare the adapters of jax_flash.compat with it."""

import numpy as np


def attend(q, k, v, seen=True, *, scale=None, softcap=None, bias=None, bias_first=False, sinks=None):
    """q [b, sq, hq, d], k and v [b, sk, hk, …], seen and bias broadcast to [b, hq, sq, sk] → out and lse.

    sinks: [hq], or [b, hq, sq]. A row that sees nothing gives 0 and −inf.
    """
    q, k, v = (np.asarray(x, float) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, group, 2) for x in (k, v))
    s = np.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    bias = 0 if bias is None else np.asarray(bias, float)
    s = s + bias * bias_first
    s = softcap * np.tanh(s / softcap) if softcap else s
    s = np.where(seen, s + bias * (not bias_first), -np.inf)
    columns = s if sinks is None else np.concatenate([s, _sink(sinks, s)], -1)
    top = np.max(columns, -1, keepdims=True, initial=-1e300)
    total = np.exp(columns - top).sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = top + np.log(total)
    p = np.exp(s - np.where(np.isfinite(lse), lse, 0))
    return np.einsum("bhqk,bkhd->bqhd", p, v), lse[..., 0]


def _sink(sinks, s):
    sinks = np.asarray(sinks, float)
    return np.broadcast_to((sinks[:, None] if sinks.ndim == 1 else sinks)[..., None], (*s.shape[:3], 1))
