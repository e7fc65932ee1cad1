"""Every shape, dtype and option rule of the paged functions, and every message."""

from __future__ import annotations

import numbers
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from .._jax import same_dim
from ..checker import INT32_MAX, Checker, is_int
from ..operands import APPEND_OPTIONAL, MAX_HEAD_DIM, MAX_LATENT_DIM, MAX_POOL_COLUMNS
from ..options import AppendArguments, PagedArguments, Pools
from ..rotary import rotary_tables
from ..spec import SCALINGS, AppendSpec, AttentionSpec
from ..validate import (
    Operands,
    check_heads,
    implementation_name,
    score_operands,
    static_spec,
)
from ..visible import operands as mask_operands
from .gather import FLOAT8

SCALES = ("k_scale", "v_scale")


def attention(op: str, arguments: PagedArguments) -> tuple[AttentionSpec, Operands]:
    """The spec and operands of a paged_attention call."""
    check = Checker(op)
    q = check.array("query", arguments.query)
    cu_seqlens = arguments.cu_seqlens_q
    check.rank("query", q, "n sq hq d" if cu_seqlens is None else "tq hq d")
    check.dtype("query", q)
    operands = {"query": q} | _pools(check, arguments, ("key", "value"), "query", q)
    value_dim, value_start = _value_columns(check, arguments, operands)
    pool = operands["key"].shape
    axes = "[p, ps, hk, d]" if arguments.page_layout == "nhd" else "[p, hk, ps, d]"
    hint = f"; page_layout={arguments.page_layout!r} means {axes}, got shape {pool}"
    check_heads(check, q.shape[-2], pool[_head_axis(arguments)], "k_pages", hint)
    operands |= _tables(check, arguments, None if cu_seqlens is not None else ("query", q))
    n = operands["block_tables"].shape[0]
    if cu_seqlens is not None:
        operands["cu_seqlens_q"] = check.int32("cu_seqlens_q", cu_seqlens)
        check.shape("cu_seqlens_q", operands["cu_seqlens_q"], (n + 1,), "n+1")
    score_operands(check, operands, arguments, n, "n")
    if arguments.draft_mask is not None:
        operands["draft_mask"] = _draft_mask(check, arguments, n, q.shape[1] if cu_seqlens is None else None)
    splits = arguments.num_splits
    if splits is not None and not (is_int(splits) and 1 <= splits <= INT32_MAX):
        raise check.fail(f"num_splits must be an int from 1 to {INT32_MAX} or None, got {splits!r}")
    invariant = check.flag("batch_invariant", arguments.batch_invariant)
    if invariant and arguments.implementation == "xla":
        raise check.fail(
            'batch_invariant is True with implementation="xla", whose compiler orders sums by the shapes of the '
            'whole call; "cpu" and "cuda" have it',
            NotImplementedError,
        )
    spec = replace(
        static_spec(check, "paged" if cu_seqlens is None else "paged_varlen", operands, arguments),
        page_layout=arguments.page_layout,
        num_splits=int(splits or 0),
        batch_invariant=invariant,
        value_dim=value_dim,
        value_start=value_start,
    )
    if arguments.mask is not None:
        mask = mask_operands.require_mask(check, arguments.mask)
        spec = mask_operands.apply(check, mask, spec, operands)
    return spec, operands


def _draft_mask(check: Checker, arguments: PagedArguments, n: Any, rows: Any) -> jax.Array:
    """[n | 1, rows, rows]; any size for packed queries, for which rows is None."""
    mask = check.array("draft_mask", arguments.draft_mask)
    if mask.dtype != jnp.bool_:
        raise check.fail(
            f"draft_mask must be boolean (True = sees the new token), got {mask.dtype}; "
            "cast it with .astype(bool)",
            TypeError,
        )
    dims = "n sq sq" if rows is not None else "n s s"
    check.rank("draft_mask", mask, dims)
    entries, *size = mask.shape
    wanted = size[0] if rows is None else rows
    if not (same_dim(entries, n) or same_dim(entries, 1)) or not all(same_dim(x, wanted) for x in size):
        raise check.fail(
            f"draft_mask must have shape [{dims.replace(' ', ', ')}] with n = {n} or 1"
            f"{'' if rows is None else f', sq = {rows}'}, got {mask.shape}"
        )
    if rows is None and same_dim(wanted, 0):
        raise check.fail(f"draft_mask must have at least one row, got shape {mask.shape}; leave it None")
    if arguments.align != "bottom_right":
        raise check.fail(
            f"align must be 'bottom_right' with draft_mask, whose tokens are the last keys, got "
            f"{arguments.align!r}"
        )
    return mask


def append(op: str, arguments: AppendArguments) -> tuple[AppendSpec, Operands]:
    """The spec and operands of an append_kv call."""
    check = Checker(op)
    k = check.array("key", arguments.key)
    cu_seqlens = arguments.cu_seqlens
    check.rank("key", k, "n s hk d" if cu_seqlens is None else "t hk d")
    stored = k.dtype in FLOAT8  # already quantised
    if not stored:
        check.dtype("key", k, hint=", and the dtype of a float8 pool")
    v = _appended_values(check, arguments, k)
    if v.dtype != k.dtype:
        raise check.fail(f"value has dtype {v.dtype}, which differs from key's {k.dtype}", TypeError)
    if v.ndim != k.ndim or not all(map(same_dim, v.shape[:-1], k.shape[:-1])):
        raise check.fail(
            f"value has shape {v.shape}, which differs from key's {k.shape} before the last dimension"
        )
    if stored:
        _check_stored(check, arguments, k)
    whole = check.array("k_pages", arguments.k_pages)
    split = whole.ndim == 5 and arguments.v_pages is None and arguments.page_layout == "nhd"
    if split:
        arguments = replace(
            arguments, k_pages=whole.reshape(*whole.shape[:3], whole.shape[3] * whole.shape[4])
        )
    operands = _pools(check, arguments, ("k_pages", "v_pages"), "key", k)
    check.dim("v_pages", "head dim", operands["v_pages"].shape[-1], v.shape[-1], "value")
    check.dim("key", "head count", k.shape[-2], operands["k_pages"].shape[_head_axis(arguments)], "k_pages")
    operands |= {"key": k, "value": v} | _tables(
        check, arguments, None if cu_seqlens is not None else ("key", k)
    )
    n = operands["block_tables"].shape[0]
    if cu_seqlens is not None:
        operands["cu_seqlens"] = check.int32("cu_seqlens", cu_seqlens)
        check.shape("cu_seqlens", operands["cu_seqlens"], (n + 1,), "n+1")
    if arguments.rotary is not None:
        operands["cos"], operands["sin"] = rotary_tables(check, arguments.rotary, k.shape[-1])
    dynamic = _dynamic(check, arguments, operands)
    if split:
        if dynamic:
            raise check.fail(
                "scale must be 'static' with k_pages of rank 5, got 'dynamic'", NotImplementedError
            )
        operands["k_pages"] = whole
    spec = AppendSpec(
        layout="append" if cu_seqlens is None else "append_varlen",
        page_layout=arguments.page_layout,
        interleaved=check.flag("interleaved", arguments.interleaved) and "cos" in operands,
        operands=tuple(
            name for name in APPEND_OPTIONAL if name in operands and not (dynamic and name in SCALES)
        ),
        implementation=implementation_name(check, arguments.implementation),
        dynamic=dynamic,
        split_columns=split,
    )
    return spec, operands


def _check_stored(check: Checker, arguments: AppendArguments, k: jax.Array) -> None:
    """New keys of a float8 dtype are stored as they are."""
    for name in ("rotary", *SCALES):
        if getattr(arguments, name) is not None:
            raise check.fail(
                f"{name} must be None with key of dtype {k.dtype}, which is stored as it is; it belongs to keys in "
                "16 or 32 bits"
            )
    if arguments.scale != "static":
        raise check.fail(
            f"scale must be 'static' with key of dtype {k.dtype}, which is stored as it is, got {arguments.scale!r}"
        )


def _appended_values(check: Checker, arguments: AppendArguments, k: jax.Array) -> jax.Array:
    """The argument `value`; if values are a part of the keys, an array without columns."""
    if arguments.v_pages is not None:
        return check.array("value", arguments.value)
    for name in ("value", "v_scale"):
        if getattr(arguments, name) is not None:
            raise check.fail(f"{name} must be None with v_pages=None, where values are a part of key")
    return k[..., :0]


def _value_columns(check: Checker, arguments: PagedArguments, operands: Operands) -> tuple[int, int]:
    """The number of the pool's columns that are V, and the first of them, if V has no pages of its own; else 0, 0.

    Adds V's scale if it is K's.
    """
    columns, start = arguments.value_dim, arguments.value_start
    if arguments.v_pages is not None:
        for name, x in (
            ("value_dim", columns),
            ("value_start", None if is_int(start) and start == 0 else start),
        ):
            if x is not None:
                raise check.fail(
                    f"{name} is {x!r}, but v_pages is given; it belongs to v_pages=None, where values are columns "
                    "of k_pages"
                )
        return 0, 0
    width, d = operands["key"].shape[-1], operands["query"].shape[-1]
    as_query = "" if columns is not None else ", as query's head dim"
    if columns is None:
        columns = d
    if not is_int(columns) or not 1 <= columns <= width:
        raise check.fail(
            f"value_dim must be an int from 1 to {width}, the columns of k_pages, with v_pages=None; got {columns!r}"
        )
    if not is_int(start) or not 0 <= start <= width - columns:
        raise check.fail(
            f"value_start must be an int from 0 to {width - columns}, the columns of k_pages less value_dim, got "
            f"{start!r}"
        )
    if columns > MAX_HEAD_DIM and arguments.implementation != "xla":
        raise check.fail(
            f'value_dim is {columns}{as_query}, allowed are 1 to {MAX_HEAD_DIM}; implementation="xla" takes any'
        )
    if arguments.v_scale is not None and start < d:
        raise check.fail(
            "v_scale must be None with v_pages=None and values that overlap the keys, where k_scale is the scale of "
            "both"
        )
    if "k_scale" in operands:
        operands.setdefault("v_scale", operands["k_scale"])
    return int(columns), int(start)


def _dynamic(check: Checker, arguments: AppendArguments, operands: Operands) -> bool:
    """Whether append_kv keeps the scales of the pages itself; it then needs both."""
    check.one_of("scale", arguments.scale, SCALINGS)
    if arguments.scale == "static":
        return False
    pool = operands["k_pages"]
    if pool.dtype not in FLOAT8:
        raise check.fail(
            f'scale="dynamic" is for float8 pools, got k_pages of dtype {pool.dtype}; use scale="static"'
        )
    wanted = pool.shape[0], pool.shape[_head_axis(arguments)]
    for name in SCALES[:1] if arguments.v_pages is None else SCALES:
        given = getattr(arguments, name)
        if given is None or jnp.ndim(given) != 2:
            got = "None" if given is None else f"shape {jnp.shape(given)}"
            raise check.fail(
                f'scale="dynamic" updates {name} [p, hk] = {wanted}, got {got}; start with jnp.ones'
            )
    operands.setdefault("v_scale", operands["k_scale"])  # for values without columns
    return True


def _head_axis(arguments: Pools) -> int:
    """The axis of the KV heads in a pool."""
    return -2 if arguments.page_layout == "nhd" else -3


def _pools(check: Checker, arguments: Pools, names: tuple[str, str], owner: str, like: jax.Array) -> Operands:
    """The two pools, by the operands' names, and their scales, after checks against the argument `owner`, whose array
    is `like`."""
    layout = arguments.page_layout
    check.page_layout(layout)
    dims = "p ps hk {}" if layout == "nhd" else "p hk ps {}"
    k = check.array("k_pages", arguments.k_pages)
    check.rank("k_pages", k, dims.format("d"))
    latent = arguments.v_pages is None
    v = k if latent else check.array("v_pages", arguments.v_pages)
    check.rank("v_pages", v, dims.format("dv"))
    if like.dtype in FLOAT8 and k.dtype != like.dtype:
        raise check.fail(f"k_pages has dtype {k.dtype}, which differs from {owner}'s {like.dtype}", TypeError)
    check_pool_dtype(check, "k_pages", k, owner, like)
    if v.dtype != k.dtype:
        raise check.fail(f"v_pages has dtype {v.dtype}, which differs from k_pages' {k.dtype}", TypeError)
    if not all(map(same_dim, v.shape[:-1], k.shape[:-1])):
        raise check.fail(
            f"v_pages has shape {v.shape}, which differs from k_pages' {k.shape} before the last dimension"
        )
    if same_dim(k.shape[2 if layout == "hnd" else 1], 0):
        raise check.fail("k_pages has page size 0, allowed are 1 and more")
    d = like.shape[-1]
    if not (latent and owner == "query" and is_int(d) and is_int(k.shape[-1]) and d <= k.shape[-1]):
        check.dim("k_pages", "head dim", k.shape[-1], d, owner)
    implementation = implementation_name(check, arguments.implementation)
    if latent and implementation != "xla":
        name, largest = ("k_pages", MAX_POOL_COLUMNS) if owner == "key" else (owner, MAX_LATENT_DIM)
        if d > largest:
            raise check.fail(
                f"{name} has head dim {d}, allowed are 1 to {largest} with v_pages=None; "
                'implementation="xla" takes any'
            )
    for name, x in (("k_pages", k), ("v_pages", v)):
        check.head_dim(name, x, "xla" if latent else implementation)
    found = dict(zip(names, (k, k[..., :0] if latent and owner == "key" else v)))
    hk = k.shape[_head_axis(arguments)]
    for name, scale in zip(SCALES, (arguments.k_scale, arguments.v_scale)):
        if scale is not None:
            if k.dtype not in FLOAT8:
                raise check.fail(
                    f"{name} must be None with pools of dtype {k.dtype}; scales belong to float8"
                )
            found[name] = _scales(check, name, scale, (k.shape[0], hk))
    return found


def check_pool_dtype(check: Checker, name: str, pool: jax.Array, owner: str, like: jax.Array) -> None:
    """Checks that a pool has the dtype of the argument `owner`, whose array is `like`, or a float8 one."""
    if pool.dtype not in (like.dtype, *FLOAT8):
        raise check.fail(
            f"{name} has dtype {pool.dtype}, allowed are {like.dtype} (as {owner}), float8_e4m3fn and float8_e5m2",
            TypeError,
        )


def _scales(check: Checker, name: str, given: Any, by_page: tuple[Any, Any]) -> jax.Array:
    """Scales as `[p, hk]`, or `[1, hk]` if a KV head has the same scale on all pages."""
    if isinstance(given, numbers.Real) and not isinstance(given, bool):
        given = jnp.float32(check.divisor(name, given))
    scale = check.float32(name, given)
    if scale.ndim == 0:
        scale = jnp.broadcast_to(scale, by_page[1:])
    wanted = by_page if scale.ndim == 2 else by_page[1:]
    if scale.ndim not in (1, 2) or not all(map(same_dim, scale.shape, wanted)):
        raise check.fail(
            f"{name} must be a number or have shape [hk] = {by_page[1:]} or [p, hk] = {by_page}, got {scale.shape}"
        )
    return scale if scale.ndim == 2 else jnp.expand_dims(scale, 0)


def _tables(check: Checker, arguments: Pools, batch: tuple[str, jax.Array] | None) -> Operands:
    """block_tables [n, pages] and kv_lengths [n]; `batch` is the name of the tokens [n, …], if they are not packed."""
    tables = check.int32("block_tables", arguments.block_tables)
    check.rank("block_tables", tables, "n pages")
    if batch is not None:
        owner, tokens = batch
        check.dim("block_tables", "number of sequences", tables.shape[0], tokens.shape[0], owner)
    lengths = check.lengths("kv_lengths", arguments.kv_lengths, tables.shape[0], "n")
    return {"block_tables": tables, "kv_lengths": lengths}
