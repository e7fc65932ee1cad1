"""Every shape, dtype and option rule of the paged functions, and every message."""

from __future__ import annotations

from typing import Any

import jax

from .._jax import same_dim
from ..rotary import rotary_tables
from ..spec import APPEND_OPTIONAL, PAGE_LAYOUTS, AppendSpec, AttentionSpec
from ..validate import Checker, Operands, check_heads, implementation_name, score_operands, static_spec
from .gather import FLOAT8


def attention(
    op: str,
    query: Any,
    k_pages: Any,
    v_pages: Any,
    block_tables: Any,
    kv_lengths: Any,
    options: dict[str, Any],
) -> tuple[AttentionSpec, Operands]:
    """The spec and operands of a paged_attention call."""
    check = Checker(op)
    q = check.array("query", query)
    cu_seqlens = options["cu_seqlens_q"]
    check.rank("query", q, "n sq hq d" if cu_seqlens is None else "tq hq d")
    check.dtype("query", q)
    operands = {"query": q} | _pools(check, "key", "value", k_pages, v_pages, q, "query", options)
    check_heads(check, q.shape[-2], operands["key"].shape[_head_axis(options)], "k_pages")
    operands |= _tables(check, block_tables, kv_lengths)
    n = operands["block_tables"].shape[0]
    if cu_seqlens is None:
        check.dim("block_tables", "number of sequences", n, q.shape[0], "query")
    else:
        operands["cu_seqlens_q"] = check.int32("cu_seqlens_q", cu_seqlens)
        check.shape("cu_seqlens_q", operands["cu_seqlens_q"], (n + 1,), "n+1")
    score_operands(check, operands, options, n, "n")
    splits = options["num_splits"]
    if splits is not None and (isinstance(splits, bool) or not isinstance(splits, int) or splits < 1):
        raise check.fail(f"num_splits must be an int ≥ 1 or None, got {splits!r}")
    return static_spec(
        check,
        "paged" if cu_seqlens is None else "paged_varlen",
        operands,
        options,
        page_layout=options["page_layout"],
        num_splits=splits or 0,
        batch_invariant=check.flag("batch_invariant", options["batch_invariant"]),
    ), operands


def append(
    op: str,
    k_pages: Any,
    v_pages: Any,
    key: Any,
    value: Any,
    block_tables: Any,
    kv_lengths: Any,
    options: dict[str, Any],
) -> tuple[AppendSpec, Operands]:
    """The spec and operands of an append_kv call."""
    check = Checker(op)
    k, v = check.array("key", key), check.array("value", value)
    cu_seqlens = options["cu_seqlens"]
    check.rank("key", k, "n s hk d" if cu_seqlens is None else "t hk d")
    check.dtype("key", k)
    if v.dtype != k.dtype:
        raise check.fail(f"value has dtype {v.dtype}, which differs from key's {k.dtype}", TypeError)
    if v.ndim != k.ndim or not all(map(same_dim, v.shape[:-1], k.shape[:-1])):
        raise check.fail(
            f"value has shape {v.shape}, which differs from key's {k.shape} before the last dimension"
        )
    operands = _pools(check, "k_pages", "v_pages", k_pages, v_pages, k, "key", options)
    check.dim("v_pages", "head dim", operands["v_pages"].shape[-1], v.shape[-1], "value")
    check.dim("key", "head count", k.shape[-2], operands["k_pages"].shape[_head_axis(options)], "k_pages")
    operands |= {"key": k, "value": v} | _tables(check, block_tables, kv_lengths)
    n = operands["block_tables"].shape[0]
    if cu_seqlens is None:
        check.dim("block_tables", "number of sequences", n, k.shape[0], "key")
    else:
        operands["cu_seqlens"] = check.int32("cu_seqlens", cu_seqlens)
        check.shape("cu_seqlens", operands["cu_seqlens"], (n + 1,), "n+1")
    if options["rotary"] is not None:
        operands["cos"], operands["sin"] = rotary_tables(check, options["rotary"], k.shape[-1])
    spec = AppendSpec(
        layout="append" if cu_seqlens is None else "append_varlen",
        page_layout=options["page_layout"],
        interleaved=check.flag("interleaved", options["interleaved"]),
        operands=tuple(name for name in APPEND_OPTIONAL if name in operands),
        implementation=implementation_name(check, options["implementation"]),
    )
    return spec, operands


def _head_axis(options: dict[str, Any]) -> int:
    """The axis of the KV heads in a pool."""
    return -2 if options["page_layout"] == "nhd" else -3


def _pools(
    check: Checker,
    k_name: str,
    v_name: str,
    k_pages: Any,
    v_pages: Any,
    like: jax.Array,
    owner: str,
    options: Any,
) -> Operands:
    """The two pools and their scales, checked against the dtype and head dim of `like` (the query or the new keys)."""
    layout = options["page_layout"]
    if layout not in PAGE_LAYOUTS:
        raise check.fail(f"page_layout must be one of {PAGE_LAYOUTS}, got {layout!r}")
    dims = "p ps hk {}" if layout == "nhd" else "p hk ps {}"
    k, v = check.array("k_pages", k_pages), check.array("v_pages", v_pages)
    check.rank("k_pages", k, dims.format("d"))
    check.rank("v_pages", v, dims.format("dv"))
    if k.dtype not in (like.dtype, *FLOAT8):
        raise check.fail(
            f"k_pages has dtype {k.dtype}, allowed are {owner}'s {like.dtype}, float8_e4m3fn and float8_e5m2",
            TypeError,
        )
    if v.dtype != k.dtype:
        raise check.fail(f"v_pages has dtype {v.dtype}, which differs from k_pages' {k.dtype}", TypeError)
    if not all(map(same_dim, v.shape[:-1], k.shape[:-1])):
        raise check.fail(
            f"v_pages has shape {v.shape}, which differs from k_pages' {k.shape} before the last dimension"
        )
    if same_dim(k.shape[2 if layout == "hnd" else 1], 0):
        raise check.fail("k_pages has page size 0, allowed are 1 and more")
    check.dim("k_pages", "head dim", k.shape[-1], like.shape[-1], owner)
    found = {k_name: k, v_name: v}
    hk = k.shape[_head_axis(options)]
    for name in ("k_scale", "v_scale"):
        if options[name] is not None:
            if k.dtype not in FLOAT8:
                raise check.fail(
                    f"{name} must be None with pools of dtype {k.dtype}; scales belong to float8"
                )
            found[name] = check.float32(name, options[name])
            check.shape(name, found[name], (hk,), "hk")
    return found


def _tables(check: Checker, block_tables: Any, kv_lengths: Any) -> Operands:
    """block_tables [n, pages] and kv_lengths [n]."""
    tables, lengths = check.int32("block_tables", block_tables), check.int32("kv_lengths", kv_lengths)
    check.rank("block_tables", tables, "n pages")
    check.shape("kv_lengths", lengths, (tables.shape[0],), "n")
    return {"block_tables": tables, "kv_lengths": lengths}
