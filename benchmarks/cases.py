"""What is measured: shapes at which speed matters, and the arithmetic that they take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Case:
    """One shape: `lengths` are those of packed sequences (then b is 1 and sq = sk = their sum)."""

    name: str
    b: int
    sq: int
    sk: int
    heads: int
    kv_heads: int
    d: int
    dtype: str
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    lengths: tuple[int, ...] = ()

    def arguments(self, seed: int) -> tuple[jax.Array, ...]:
        """query, key, value, dout."""
        keys = jax.random.split(jax.random.key(seed), 4)
        lead = () if self.lengths else (self.b,)
        q, k = (*lead, self.sq, self.heads, self.d), (*lead, self.sk, self.kv_heads, self.d)
        return tuple(
            jax.random.normal(key, shape, self.dtype) for key, shape in zip(keys, (q, k, k, q), strict=True)
        )

    def cu_seqlens(self) -> jax.Array:
        return jnp.asarray(np.concatenate([[0], np.cumsum(self.lengths)]), jnp.int32)

    def pairs(self) -> int:
        """Visible (query, key) pairs of one head, over the whole batch."""
        if self.lengths:
            return sum(_visible(n, n, self.causal, None) for n in self.lengths)
        return self.b * _visible(self.sq, self.sk, self.causal, self.window)

    def flop(self, pass_: str) -> float:
        """Two products forward, five backward, over visible pairs only."""
        return {"forward": 4.0, "backward": 10.0}[pass_] * self.heads * self.pairs() * self.d

    def describe(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value not in (None, ())}


def _visible(sq: int, sk: int, causal: bool, window: tuple[int | None, int | None] | None) -> int:
    diagonal = np.arange(sq) + (sk - sq)
    left, right = window or (None, None)
    right = 0 if causal else right
    high = np.full(sq, sk - 1) if right is None else np.minimum(diagonal + right, sk - 1)
    low = np.zeros(sq, int) if left is None else np.maximum(diagonal - left, 0)
    return int(np.maximum(high - low + 1, 0).sum())


def _grid(shapes: list[tuple[int, int, int, int, int]], dtypes: tuple[str, ...]) -> list[Case]:
    return [
        Case(
            f"b{b} s{s} h{h}/{hk} d{d} {dtype}{' causal' if causal else ''}", b, s, s, h, hk, d, dtype, causal
        )
        for dtype in dtypes
        for b, s, h, hk, d in shapes
        for causal in (False, True)
    ]


def _packed(lengths: tuple[int, ...], heads: int, kv_heads: int, d: int, dtype: str) -> Case:
    total = sum(lengths)
    name = f"{len(lengths)} packed t{total} h{heads}/{kv_heads} d{d} {dtype} causal"
    return Case(name, 1, total, total, heads, kv_heads, d, dtype, True, None, lengths)


# 16,384 tokens and heads × d = 2048 on a GPU: the shapes that the field reports.
GPU = [
    *_grid(
        [(16384 // s, s, 2048 // d, 2048 // d, d) for d in (64, 128, 256) for s in (1024, 4096, 16384)],
        ("bfloat16",),
    ),
    *_grid([(4, 4096, 32, 8, 128)], ("bfloat16", "float16")),
    Case("window b4 s4096 h16/16 d128 bfloat16", 4, 4096, 4096, 16, 16, 128, "bfloat16", True, (512, 0)),
    _packed((4096, 2048, 1024, 512, 512, 4096, 3072, 1024), 16, 16, 128, "bfloat16"),
]
CPU = [
    *_grid([(4, 512, 4, 4, 64), (1, 2048, 8, 8, 64), (1, 2048, 8, 2, 128)], ("float32", "bfloat16")),
    Case("window b1 s2048 h8/8 d64 float32", 1, 2048, 2048, 8, 8, 64, "float32", True, (256, 0)),
    _packed((512, 300, 77, 135, 700, 324), 8, 8, 64, "float32"),
]
