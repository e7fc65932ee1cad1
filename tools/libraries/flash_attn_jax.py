"""flash_attn_jax: its tests with `jax_flash.compat.flash_attn` in place of its CUDA kernels.

Its attention runs on GPUs only. Its tests compare results with equations in plain JAX, which they contain.
"""

from __future__ import annotations

import sys
import types

import jax

from jax_flash.compat.flash_attn import flash_attn_func, flash_attn_varlen_func

from .common import Library, source

GPU = "reads the HLO of its own custom calls"
EXPECTED: dict[str, str] = {
    "*_sharded_hlo*": GPU,
}


def flash_mha(q, k, v, softmax_scale=None, is_causal=False, window_size=(-1, -1)) -> jax.Array:  # type: ignore[no-untyped-def]
    return flash_attn_func(q, k, v, softmax_scale=softmax_scale, causal=is_causal, window_size=window_size)


def flash_mha_varlen(  # type: ignore[no-untyped-def]
    q, k, v, seqlens_q, seqlens_k=None, *, max_seqlen_q=-1, max_seqlen_k=-1, softmax_scale=None, is_causal=False,
    window_size=(-1, -1),
) -> jax.Array:  # fmt: skip
    return flash_attn_varlen_func(
        q, k, v, seqlens_q, seqlens_q if seqlens_k is None else seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale=softmax_scale, causal=is_causal, window_size=window_size,
    )  # fmt: skip


def main() -> int:
    # Its extension module needs CUDA's libraries. The tests never call it, so an empty module replaces it.
    package, api = types.ModuleType("flash_attn_jax_lib"), types.ModuleType("flash_attn_jax_lib.flash_api")
    api.get_ffi_registrations = dict  # type: ignore[attr-defined]
    package.flash_api = api  # type: ignore[attr-defined]
    sys.modules |= {package.__name__: package, api.__name__: api}
    import flash_attn_jax
    import flash_attn_jax.varlen

    flash_attn_jax.flash_mha = flash_mha
    flash_attn_jax.flash_mha_varlen = flash_attn_jax.varlen.flash_mha_varlen = flash_mha_varlen
    library = Library("flash_attn_jax", "flash_attn_jax", EXPECTED)
    tests = source() / "tests"
    # test_ring.py and test_comparison.py do not call these functions, or need PyTorch on a GPU.
    library.pytest(*(tests / f"test_{name}.py" for name in ("flash", "varlen", "cross", "sharding")))
    return library.report()


if __name__ == "__main__":
    sys.exit(main())
