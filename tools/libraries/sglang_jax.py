"""sglang-jax: the tests of its attention backend, with our adapter in place of its TPU kernel.

They call its layer, its backend and its pool of pages; what schedules requests is not imported.
"""

from __future__ import annotations

import sys
import types
import unittest
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jax_flash.compat import sglang_jax

from .common import Library, bare

EXPECTED: dict[str, str] = {}
TOKENS = 8192  # of the pool; theirs are 710,016, 11 GiB, of which they use 5,100


def ragged_paged_attention(*arguments: Any, **named: Any) -> tuple[jax.Array, jax.Array]:
    """Takes the place of sglang-jax's function, which in 0.0.2 returns the cache by tokens instead of pages."""
    out, cache = sglang_jax.ragged_paged_attention(*arguments, **named)
    return out, cache.reshape(-1, *cache.shape[2:])


def write(fused_kv: Any, loc: Any, kv_cache: Any, **_: Any) -> jax.Array:
    """Takes the place of sglang-jax's other TPU kernel, with which the tests fill the cache before a call."""
    return kv_cache.at[jnp.where(loc < 0, kv_cache.shape[0], loc)].set(fused_kv, mode="drop")


def arrays(lens: Any, num_heads: int, head_dim: int, num_kv_heads: int, page_size: int) -> list[jax.Array]:
    """Queries, keys and values of the tests. Their own function mistakes a pair for a number in 0.0.2."""
    queries, keys = sum(x for x, _ in lens), sum(-(-x // page_size) * page_size for _, x in lens)
    shapes = [(queries, num_heads), (keys, num_kv_heads), (keys, num_kv_heads)]
    return [jax.random.normal(jax.random.key(i), (*x, head_dim), jnp.bfloat16) for i, x in enumerate(shapes)]


def stub(name: str, **members: Any) -> None:
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(members)


def runs_here() -> tuple[types.ModuleType, types.ModuleType]:
    """Its attention backend and its pool of pages, with the adapter; its scheduler is not imported."""
    bare("sgl_jax.srt.utils")
    sys.modules["sgl_jax.srt.utils"].cdiv = lambda a, b: -(-a // b)  # type: ignore[attr-defined]
    stub("sgl_jax.srt.managers.schedule_batch", ModelWorkerBatch=types.SimpleNamespace)
    from sgl_jax.srt.layers.attention import flashattention_backend
    from sgl_jax.srt.mem_cache import memory_pool

    flashattention_backend.ragged_paged_attention = ragged_paged_attention
    memory_pool.update_fused_kv_cache = write
    return flashattention_backend, memory_pool


def main() -> int:
    stub("sgl_jax.test.test_utils", CustomTestCase=unittest.TestCase)
    _, memory_pool = runs_here()
    pool = memory_pool.MHATokenToKVPool
    made = pool.__init__
    pool.__init__ = lambda self, size, **named: made(self, size=min(size, TOKENS), **named)
    library = Library("sglang_jax", "sglang-jax", EXPECTED)
    from sgl_jax.test import test_flashattention

    def reference(q: Any, k: Any, v: Any, kv_lens: Any, pages: Any, *rest: Any, **named: Any) -> jax.Array:
        """Their reference, called with the used pages only; it would read 4,096 pages of each sequence."""
        used = -(-int(kv_lens.max()) // k.shape[1])
        return own(q, k, v, kv_lens, pages[:, :used], *rest, **named)

    own, test_flashattention.ref_ragged_paged_attention = (
        test_flashattention.ref_ragged_paged_attention,
        reference,
    )
    test_flashattention.create_qkv_cache = arrays
    library.pytest(Path(test_flashattention.__file__))
    return library.report()


if __name__ == "__main__":
    sys.exit(main())
