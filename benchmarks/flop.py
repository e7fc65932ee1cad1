"""The FLOP and bytes of calls: the numerators of all rates.

FLOP are counted by `jax_flash.flops`, over visible pairs of a query and a key: pairs that a causal mask, a window, a
length or a sequence boundary hides do not count. Cases with boolean masks, biases or segment ids count as without them.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

import jax_flash
from tests.cases import Case, token_dims

MATMUL_SIZE = {"gpu": 8192, "cpu": 2048}  # size of the square product that calls are compared with


def matmul(platform: str) -> float:
    return 2.0 * MATMUL_SIZE[platform] ** 3


def attention(case: Case, pass_: str) -> float:
    """The FLOP of a pass; "both" is the forward pass and the backward pass, "jvp" the forward pass and the tangent."""
    rows, columns = token_dims(case)

    def array(tokens: tuple[int, ...], heads: int, width: int) -> Any:
        return jax.ShapeDtypeStruct((*tokens, heads, width), case.dtype)

    arrays = array(rows, case.hq, case.d), array(columns, case.hk, case.d), array(columns, case.hk, case.dv)
    options: dict[str, Any] = dict(causal=case.causal, window=case.window, align=case.align)
    options["kv_lengths"] = case.kv_lengths
    if case.layout == "varlen":
        k_sequences = case.q_sequences if case.k_sequences is None else case.k_sequences
        offsets = (np.cumsum((0, *lengths)) for lengths in (case.q_sequences, k_sequences))
        function: Any = jax_flash.flash_attention_varlen
        arrays = (*arrays, *offsets)
    else:
        function, options["q_lengths"] = jax_flash.flash_attention, case.q_lengths
    passes: Any = {"both": ("forward", "backward"), "jvp": ("forward", "tangent")}.get(pass_, (pass_,))
    return float(sum(jax_flash.flops(function, *arrays, of=of, **options) for of in passes))


def kv_bytes(sequences: int, kv_heads: int, head_dim: int, keys: float, itemsize: int) -> float:
    """Bytes of keys and values that decode reads once; `keys` is the mean length of a sequence."""
    return 2.0 * sequences * kv_heads * head_dim * keys * itemsize
