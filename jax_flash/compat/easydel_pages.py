"""ejkernel's attention over pages, with which EasyDeL serves, with the arguments of `ejkernel.modules`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..checker import Checker
from ..options import ArrayLike, Implementation, IndexLike
from ..paged.attention import paged_attention
from .ragged_paged_attention import check_window, ragged_paged_attention, ragged_paged_attention_update

_CHECK = Checker("easydel.unified_attention")


def ragged_page_attention_v2(
    queries: ArrayLike,
    kv_pages: ArrayLike,
    context_lens: IndexLike,
    block_tables: IndexLike,
    query_start_loc: IndexLike,
    num_seqs: IndexLike,
    softmax_aux: ArrayLike | None = None,
    /,
    *,
    softmax_scale: float | None = None,
    logits_soft_cap: float | None = None,
    compute_dtype: Any = None,
    optimized: bool = False,
    sliding_window: int | tuple[int, int] | None = None,
    mask_value: float | None = None,
    vmem_limit_bytes: int | None = None,
    platform: Any = None,
    cfg: Any = None,
    mesh: Any = None,
    in_specs: Any = None,
    out_specs: Any = None,
    implementation: Implementation | None = None,
) -> Array:
    """ejkernel's `ragged_page_attention_v2` with its arguments and meaning.

    Args:
      queries, kv_pages, context_lens, block_tables, query_start_loc, num_seqs: q, kv_pages, kv_lens, page_indices,
        cu_q_lens and num_seqs of `ragged_paged_attention`, whose heads are K0 V0 K1 V1 …
      softmax_aux: `[hq]`, sinks.
      softmax_scale: factor of q·kᵀ, 1/√d by default.
      sliding_window: W keys are visible, the row's own among them; or a pair, of which causal rows need only the first.
      mesh, in_specs, out_specs: where all three are given, the call runs in a `shard_map` with them.
      compute_dtype, optimized, mask_value, vmem_limit_bytes, platform, cfg: have no effect.

    Returns:
      `[tokens, hq, d]`, queries' dtype.

    Raises:
      ValueError, TypeError, NotImplementedError: as in `ragged_paged_attention`.

    Source: the interface is ejkernel's.

    Example:
      >>> out = ragged_page_attention_v2(queries, kv_pages, context_lens, block_tables, query_start_loc, num_seqs)
    """
    del compute_dtype, optimized, mask_value, vmem_limit_bytes, platform, cfg

    def call(*arrays: Any) -> Array:
        *given, sinks = arrays
        return ragged_paged_attention(
            *given,
            sm_scale=arrays[0].shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
            sliding_window=_left(sliding_window),
            soft_cap=logits_soft_cap,
            attention_sink=sinks,
            implementation=implementation,
        )

    arrays = queries, kv_pages, context_lens, block_tables, query_start_loc, num_seqs, softmax_aux
    out: Array = _sharded(call, mesh, in_specs, out_specs)(*arrays)
    return out


def ragged_page_attention_v3(
    queries: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    kv_cache: ArrayLike,
    kv_lens: IndexLike,
    block_tables: IndexLike,
    query_start_loc: IndexLike,
    distribution: IndexLike,
    softmax_aux: ArrayLike | None = None,
    /,
    *,
    softmax_scale: float = 1.0,
    sliding_window: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    vmem_limit_bytes: int | None = None,
    platform: Any = None,
    cfg: Any = None,
    mesh: Any = None,
    in_specs: Any = None,
    out_specs: Any = None,
    implementation: Implementation | None = None,
) -> tuple[Array, Array]:
    """ejkernel's `ragged_page_attention_v3` with its arguments and meaning: it writes the new keys, then attends.

    Args:
      queries, keys, values, kv_cache, kv_lens, distribution, q_scale, k_scale, v_scale: as in
        `ragged_paged_attention_update`.
      block_tables: its page_indices, `[n · pages]`.
      query_start_loc: its cu_q_lens, `[n + 1]`.
      softmax_scale: factor of q·kᵀ; note the default of 1.
      softmax_aux, sliding_window, logits_soft_cap, mesh, in_specs, out_specs: as in `ragged_page_attention_v2`.
      vmem_limit_bytes, platform, cfg: have no effect.

    Returns:
      `(out [tokens, hq, d], kv_cache)`; a donated kv_cache is updated in place.

    Raises:
      ValueError, TypeError, NotImplementedError: as in `ragged_paged_attention_update`.

    Source: the interface is ejkernel's.

    Example:
      >>> step = jax.jit(ragged_page_attention_v3, donate_argnums=3)
    """
    del vmem_limit_bytes, platform, cfg

    def call(*arrays: Any) -> tuple[Array, Array]:
        return ragged_paged_attention_update(
            *arrays,
            sm_scale=softmax_scale,
            sliding_window=_left(sliding_window),
            soft_cap=logits_soft_cap,
            q_scale=q_scale,
            k_scale=k_scale,
            v_scale=v_scale,
            implementation=implementation,
        )

    new = queries, keys, values, kv_cache
    where = kv_lens, block_tables, query_start_loc, distribution
    out, cache = _sharded(call, mesh, in_specs, out_specs)(*new, *where, softmax_aux)
    return out, cache


def unified_attention(
    queries: ArrayLike,
    key_cache: ArrayLike,
    value_cache: ArrayLike,
    kv_lens: IndexLike,
    block_tables: IndexLike,
    query_start_loc: IndexLike,
    alibi_slopes: ArrayLike | None = None,
    qq_bias: ArrayLike | None = None,
    softmax_aux: ArrayLike | None = None,
    /,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    sliding_window: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    seq_threshold_3d: int | None = None,
    platform: Any = None,
    mesh: Any = None,
    in_specs: Any = None,
    out_specs: Any = None,
    cfg: Any = None,
    implementation: Implementation | None = None,
) -> Array:
    """ejkernel's `unified_attention` with its arguments and meaning.

    Args:
      queries: `[tokens, hq, d]`, packed at query_start_loc, int32 `[n + 1]`.
      key_cache, value_cache: `[p, ps, hk, d]`.
      kv_lens, block_tables: int32 `[n]` and `[n, pages]`.
      alibi_slopes: `[hq]`; not with softmax_aux or logits_soft_cap, as ejkernel counts them from each sequence's first
        query and adds them before the soft cap.
      qq_bias: must be None. A tree of new tokens is `draft_mask` of `jax_flash.paged_attention`.
      softmax_scale: factor of q·kᵀ, 1/√d by default.
      softmax_aux, sliding_window, logits_soft_cap, mesh, in_specs, out_specs: as in `ragged_page_attention_v2`.
      causal: must be True.
      seq_threshold_3d, platform, cfg: have no effect.

    Returns:
      `[tokens, hq, d]`, queries' dtype.

    Raises:
      NotImplementedError: for qq_bias, causal=False, and slopes with softmax_aux or logits_soft_cap.
      ValueError, TypeError: as in `jax_flash.paged_attention`.

    Source: the interface is ejkernel's.

    Example:
      >>> out = unified_attention(queries, key_cache, value_cache, kv_lens, block_tables, query_start_loc)
    """
    del seq_threshold_3d, platform, cfg
    cap = 0 if logits_soft_cap is None else _CHECK.number("logits_soft_cap", logits_soft_cap)
    for given, why in (
        (
            qq_bias is not None,
            "qq_bias is not added to scores of pages; draft_mask of paged_attention hides tokens",
        ),
        (not _CHECK.flag("causal", causal), "causal must be True"),
        (
            alibi_slopes is not None and (softmax_aux is not None or cap > 0),
            "alibi_slopes do not go with softmax_aux or logits_soft_cap",
        ),
    ):
        if given:
            raise _CHECK.fail(why, NotImplementedError)
    window = check_window(_CHECK, _left(sliding_window) or None)  # ejkernel takes 0 for none here

    def call(*arrays: Any) -> Array:
        *pages, starts, slopes, _, sinks = arrays
        out: Array = paged_attention(
            *pages,
            cu_seqlens_q=starts,
            causal=True,
            window=None if window is None else (window - 1, 0),
            scale=softmax_scale,
            softcap=logits_soft_cap,
            alibi_slopes=slopes,
            sinks=None if sinks is None else jnp.asarray(sinks, jnp.float32),
            implementation=implementation,
        )
        return out

    caches = queries, key_cache, value_cache, block_tables, kv_lens
    if in_specs is not None:  # in ejkernel's order, lengths before tables
        in_specs = (*in_specs[:3], in_specs[4], in_specs[3], *in_specs[5:])
    out: Array = _sharded(call, mesh, in_specs, out_specs)(
        *caches, query_start_loc, alibi_slopes, None, softmax_aux
    )
    return out


def _left(window: Any) -> Any:
    return window[0] if isinstance(window, tuple) else window


def _sharded(call: Callable[..., Any], mesh: Any, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """The call in a shard_map where its mesh and specs are all given, as in ejkernel."""
    if mesh is None or in_specs is None or out_specs is None:
        return call
    return jax.shard_map(call, mesh=mesh, in_specs=tuple(in_specs), out_specs=out_specs, check_vma=False)
