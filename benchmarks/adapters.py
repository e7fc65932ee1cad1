"""How each implementation is called: Case → a function of query, key, value and the other arrays by name.

An adapter imports its library itself. It raises Refused, with the reason, if that library cannot compute a case
although it has the options (peers.Peer lists these).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax.numpy as jnp

import jax_flash

from .cases import Case

Attend = Callable[..., Any]  # (query, key, value, other arrays by name) → out


class Refused(Exception):
    """The implementation cannot run the case, or is not installed."""


def ours(case: Case, package: ModuleType = jax_flash, **options: Any) -> Attend:
    """This library; `package` may be jax_flash of another checkout."""
    options = case.options | options
    if case.layout == "varlen":
        return lambda q, k, v, arrays: package.flash_attention_varlen(q, k, v, **arrays, **options)
    return lambda q, k, v, arrays: package.flash_attention(q, k, v, **arrays, **options)


def ours_by_segments(case: Case) -> Attend:
    """This library on packed documents, given as one row with segment ids."""
    if case.layout != "varlen" or case.k_sequences is not None:
        raise Refused("for packed documents")

    def attend(q: Any, k: Any, v: Any, arrays: dict[str, Any]) -> Any:
        ids = document_ids(arrays["cu_seqlens_q"], q.shape[0])[None]
        return jax_flash.flash_attention(q[None], k[None], v[None], segment_ids=ids, **case.options)[0]

    return attend


def document_ids(offsets: Any, tokens: int) -> Any:
    """The index of each token's document."""
    return jnp.searchsorted(offsets, jnp.arange(tokens), side="right").astype(jnp.int32)


def jax_nn(implementation: str, module_name: str = "jax.nn") -> Callable[[Case], Attend]:
    """jax.nn.dot_product_attention, or another function with its signature."""

    def make(case: Case) -> Attend:
        module: Any = importlib.import_module(module_name)
        options: dict[str, Any] = {
            "is_causal": case.causal,
            "local_window_size": case.window,
            "implementation": implementation,
        }
        if case.scale is not None:
            options["scale"] = case.scale
        if case.softcap is not None:
            options["logits_soft_cap"] = case.softcap
        names = {"q_lengths": "query_seq_lengths", "kv_lengths": "key_value_seq_lengths"}

        def attend(q: Any, k: Any, v: Any, arrays: dict[str, Any]) -> Any:
            if case.layout == "varlen":
                return packed(q, k, v, arrays)
            return module.dot_product_attention(
                q, k, v, **{names.get(name, name): x for name, x in arrays.items()}, **options
            )

        def packed(q: Any, k: Any, v: Any, arrays: dict[str, Any]) -> Any:
            """Packs all tokens into one row under a block-diagonal mask, because this interface has no packed
            sequences."""
            rows, columns = (
                document_ids(arrays[name], x.shape[0])
                for name, x in (("cu_seqlens_q", q), ("cu_seqlens_k", k))
            )
            mask = (rows[:, None] == columns[None, :])[None, None]
            return module.dot_product_attention(q[None], k[None], v[None], mask=mask, **options)[0]

        return attend

    return make


def tokamax(case: Case) -> Attend:
    """tokamax 0.0.17: its Pallas Mosaic kernels, behind the signature of jax.nn.dot_product_attention.

    It imports xprof for its own benchmarks; if that is not installed, an empty module replaces it.
    """
    if "xprof" not in sys.modules and importlib.util.find_spec("xprof") is None:
        for name in ("xprof", "xprof.cli", "xprof.cli.tools"):
            sys.modules.setdefault(name, ModuleType(name))
        sys.modules["xprof.cli.tools"].get_kernel_stats_tool = None  # type: ignore[attr-defined]
    return jax_nn("mosaic", "tokamax")(case)


def pallas(case: Case) -> Attend:
    """JAX's own example kernel for Triton."""
    from jax.experimental.pallas.ops.gpu.attention import mha

    return lambda q, k, v, arrays: mha(q, k, v, None, sm_scale=case.d**-0.5, causal=case.causal)


def mosaic(case: Case) -> Attend:
    """JAX's own example kernel for Hopper: float16 only, and without a scale, so it computes softmax(q kᵀ) v."""
    module: Any = importlib.import_module("jax.experimental.pallas.ops.gpu.attention_mgpu")
    keys = 64 if case.d > 128 else 128
    tiles = module.TuningConfig(block_q=64, block_kv=keys, max_concurrent_steps=2, causal=case.causal)
    return lambda q, k, v, arrays: module.attention(q, k, v, tiles)


def fa4_jax(case: Case) -> Attend:
    """fa4-jax 0.1.0: FlashAttention-4's CuTe kernels, whose causal mask is bottom-right aligned."""
    module: Any = importlib.import_module("fa4_jax")
    options = {"causal": case.causal, "window_size": case.window, "scale": case.scale, "backend": "cute"}
    if case.layout == "fixed":
        return lambda q, k, v, arrays: module.flash_attn(q, k, v, **options)
    return lambda q, k, v, arrays: module.flash_attn_varlen(
        q, k, v, arrays["cu_seqlens_q"], arrays["cu_seqlens_k"], **options
    )


def flash_attn3_jax(case: Case) -> Attend:
    """flash-attn3-jax 0.2.3: FlashAttention-3's kernels for Hopper, of an older build, d ≤ 128."""
    if case.d > 128:
        raise Refused("head dims up to 128")
    module: Any = importlib.import_module("flash_attn3_jax")
    left, right = (-1 if side is None else side for side in case.window or (None, None))
    options = {"softmax_scale": case.scale, "is_causal": case.causal, "window_size": (left, right)}
    if case.layout == "fixed":
        return lambda q, k, v, arrays: module.flash_mha(q, k, v, **options)
    longest = {
        "max_seqlen_q": max(case.q_sequences),
        "max_seqlen_k": max(case.k_sequences or case.q_sequences),
    }
    return lambda q, k, v, arrays: module.flash_mha_varlen(
        q, k, v, arrays["cu_seqlens_q"], arrays["cu_seqlens_k"], **options, **longest
    )


def dew_flash_attn(case: Case) -> Attend:
    """dew-flash-attn-cu13 0.3.6: FlashAttention-3's kernels, of a newer build, whose causal mask is bottom-right
    aligned."""
    if case.d != case.dv:
        raise Refused("one head dim for q, k and v")
    module: Any = importlib.import_module("dew_flash_attn")
    left, right = (-1 if side is None else side for side in case.window or (None, None))
    options = {"softmax_scale": case.scale, "is_causal": case.causal, "window_size": (left, right)}
    if case.layout == "fixed":
        return lambda q, k, v, arrays: module.flash_mha(q, k, v, sinks=arrays.get("sinks"), **options)
    longest = max(case.q_sequences)
    return lambda q, k, v, arrays: module.flash_mha_varlen(
        q,
        k,
        v,
        arrays["cu_seqlens_q"],
        longest,
        key_cu_seqlens=arrays["cu_seqlens_k"],
        key_max_seqlen=max(case.k_sequences or case.q_sequences),
        **options,
    )


def jla(backward: str) -> Callable[[Case], Attend]:
    """jax-linear-attention 0.1.0: Pallas kernels for Hopper, causal only, with one of its two backward passes."""

    def make(case: Case) -> Attend:
        if (case.d, case.dv) not in ((64, 64), (128, 128), (192, 128)):
            raise Refused("head dims 64, 128 and 192/128")
        if backward == "fused" and case.d != case.dv:
            raise Refused("its fused backward has one head dim for q, k and v")
        left, right = case.window or (None, None)
        if not (case.causal or right == 0):
            raise Refused("causal attention alone")
        module: Any = importlib.import_module("jla.ops.mosaic_gpu.attention")
        options = {"scale": case.scale, "backward": backward}
        if left is not None:
            options["sliding_window"] = left + 1  # counts the query's own key

        def attend(q: Any, k: Any, v: Any, arrays: dict[str, Any]) -> Any:
            if case.layout == "varlen":
                ids = document_ids(arrays["cu_seqlens_q"], q.shape[0])[None]
                return module.flash_attention(q[None], k[None], v[None], segment_ids=ids, **options)[0]
            others = {"sinks": arrays["sinks"]} if "sinks" in arrays else {}
            if "segment_ids" in arrays:
                others["segment_ids"] = arrays["segment_ids"][0]
            return module.flash_attention(q, k, v, **options, **others)

        return attend

    return make


def torch(case: Case) -> Attend:
    module: Any = importlib.import_module("torch")
    attend = module.nn.functional.scaled_dot_product_attention
    return lambda q, k, v, arrays: attend(q, k, v, is_causal=case.causal, enable_gqa=case.hq != case.hk)
