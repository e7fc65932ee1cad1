"""The arithmetic and the bytes that a call takes: the only place where rates get their numerators.

FLOP count the products over visible pairs of a query and a key alone: what a causal mask, a window, a length or a
sequence boundary hides counts for nothing. Boolean masks, biases and segment ids take no pair away, since kernels
multiply those as well.
"""

from __future__ import annotations

import numpy as np

from tests.cases import Case

MATMUL_SIZE = {"gpu": 8192, "cpu": 2048}  # of the square product that calls are held against


def matmul(platform: str) -> float:
    return 2.0 * MATMUL_SIZE[platform] ** 3


def attention(case: Case, pass_: str) -> float:
    """Forward: S = QKᵀ and O = PV. Backward: S again, dP = dO Vᵀ, dQ, dK and dV. "both" is their sum.

    "jvp" is the forward and the tangent: S again, its two tangents, and two products with V and its tangent.
    """
    d, dv = case.d, case.dv
    both = 4 * d + 3 * dv
    features = {"forward": d + dv, "backward": 3 * d + 2 * dv, "both": both, "jvp": both}[pass_]
    return 2.0 * features * case.hq * visible_pairs(case)


def visible_pairs(case: Case) -> int:
    """Pairs (query, key) of one head over the whole batch."""
    if case.layout == "varlen":
        k_sequences = case.q_sequences if case.k_sequences is None else case.k_sequences
        if case.kv_lengths is not None:
            k_sequences = tuple(map(min, k_sequences, case.kv_lengths))
        return sum(_band(case, sq, sk) for sq, sk in zip(case.q_sequences, k_sequences, strict=True))
    queries = [case.sq] * case.b if case.q_lengths is None else case.q_lengths
    keys = [case.sk] * case.b if case.kv_lengths is None else case.kv_lengths
    return sum(_band(case, sq, sk) for sq, sk in zip(queries, keys, strict=True))


def _band(case: Case, sq: int, sk: int) -> int:
    """Visible pairs of one sequence."""
    diagonal = np.arange(sq) + (sk - sq if case.align == "bottom_right" else 0)
    left, right = case.window or (None, None)
    right = 0 if case.causal else right
    high = np.full(sq, sk - 1) if right is None else np.minimum(diagonal + right, sk - 1)
    low = np.zeros(sq, int) if left is None else np.maximum(diagonal - left, 0)
    return int(np.maximum(high - low + 1, 0).sum())


def kv_bytes(sequences: int, kv_heads: int, head_dim: int, keys: float, itemsize: int) -> float:
    """Bytes of keys and values that decode reads once; `keys` is the mean length of a sequence."""
    return 2.0 * sequences * kv_heads * head_dim * keys * itemsize
