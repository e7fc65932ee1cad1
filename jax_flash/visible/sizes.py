"""The sizes of a call that the arrays of its mask have, and the checks that they do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from .._jax import same_dim
from ..checker import Checker
from . import forms
from .forms import Form


@dataclass(frozen=True)
class Sizes:
    """The dimensions of a call that the arrays of masks have.

    `keys` is only set if keys are arrays of their own. `columns` are the keys that a sequence may have, in a ring those
    of all devices.
    """

    batch: Any  # number of batch entries or sequences
    heads: int
    kv_heads: int
    rows: Any
    columns: Any
    keys: Any = None
    packed: bool = False
    pages: bool = False
    chunk: Any = None  # in a ring: the number of a device's rows that are consecutive in the sequence

    def shape(self, dims: str) -> tuple[Any, ...]:
        sizes = {"b": self.batch, "n": self.batch, "hq": self.heads, "sq": self.rows, "tq": self.rows}
        sizes |= {"sk": self.keys, "tk": self.columns, "columns": self.columns}
        return tuple(sizes[dim] for dim in dims.split())


def check_sizes(check: Checker, x: Form, sizes: Sizes) -> None:
    """Checks that the arrays of a condition have the sizes of the call."""

    def fits(name: str, array: Any, dims: str, sizes: Sizes = sizes, *, keys: bool = False) -> None:
        """`keys`: the last dimension, of keys that rows search, must not be broadcast."""
        if array is None or jnp.ndim(array) == 0:
            return
        if sizes.packed and jnp.ndim(array) > len(dims.split()) and same_dim(array.shape[0], 1):
            array = array[0]  # packed tokens are one batch entry
        wanted = sizes.shape(dims)
        check.broadcastable(f"mask's {name}", array, wanted, dims)
        if keys:
            check.dim(f"mask's {name}", "keys", array.shape[-1], wanted[-1], "the call")

    entry = "n" if sizes.packed else "b"
    for name in ("left", "right", "offset", "lengths", "first"):
        fits(name, getattr(x, name, None), entry)
    made_for = x.columns if isinstance(x, (forms.Ranges, forms.Blocks)) else None
    if made_for is not None and sizes.keys is not None:
        check.dim("mask's from_function", "sk", made_for, sizes.columns, "the call")
    if isinstance(x, forms.Ranges):
        for name, limit in (pair for limits in x.limits for pair in zip(("lo", "hi"), limits)):
            name = "from_function" if x.by_sequence else name
            if sizes.packed and x.by_sequence:
                fits(name, limit, "n hq sq", replace(sizes, rows=jnp.shape(limit)[-1]))
            else:
                fits(name, limit, "hq tq" if sizes.packed else "b hq sq")
    elif isinstance(x, forms.Blocks):
        _check_blocks(check, x, sizes)
    elif isinstance(x, forms.Spans):
        fits("span ids", x.ids, "tq" if sizes.packed else "b sq", keys=True)
    elif isinstance(x, (forms.Segments, forms.Positions)):
        if isinstance(x, forms.Segments):
            arrays = {"segments of queries": x.q_ids, "segments of keys": x.kv_ids}
        else:
            arrays = {"q_positions": x.q_positions, "kv_positions": x.kv_positions}
        (of_rows, q), (of_keys, k) = arrays.items()
        fits(of_rows, q, "tq" if sizes.packed else "b sq")
        fits(
            of_keys, k, "b sk" if sizes.keys is not None else "n columns" if sizes.pages else "tk", keys=True
        )
    elif isinstance(x, forms.Dense) and sizes.keys is None:
        _check_elements(check, x, sizes)
    elif isinstance(x, forms.Dense):
        fits("from_function" if x.by_sequence else "dense array", x.seen, "b hq sq columns")


def _check_blocks(check: Checker, x: forms.Blocks, sizes: Sizes) -> None:
    """Blocks of packed sequences count from the first row of each; rows past the last one see no key."""
    shape = forms.with_rank(x.chosen, 4).shape
    b, h, blocks = shape[0], shape[-3], shape[-2]
    rows = blocks if sizes.packed else -(-sizes.rows // x.block[0])
    good = len(shape) == 4 and (same_dim(b, 1) or same_dim(b, sizes.batch))
    if not (good and h in (1, sizes.kv_heads, sizes.heads) and same_dim(blocks, rows)):
        allowed = f"[{sizes.batch} or 1, {sizes.heads}, {sizes.kv_heads} or 1, {rows}, n]"
        raise check.fail(f"mask's chosen blocks must have shape {allowed}, got {x.chosen.shape}")
    if sizes.chunk is not None and sizes.chunk % x.block[0]:
        raise check.fail(
            f"mask's blocks of {x.block[0]} rows must divide the {sizes.chunk} consecutive rows of a device"
        )


def _check_elements(check: Checker, x: forms.Dense, sizes: Sizes) -> None:
    """Boolean arrays where keys are packed or in pages, of which there may be any number."""
    b, h, rows, _ = forms.with_rank(x.seen, 4).shape
    own_rows = sizes.packed and (x.by_sequence or not same_dim(b, 1))
    if x.by_sequence is None:
        raise check.fail(
            "mask joins masks.from_function(…) with masks.dense(…), or two masks.dense(…) of other rows or keys by |; "
            "beside packed keys and pages masks.dense(…) of one array takes any mask"
        )
    entries = (1, sizes.batch) if own_rows or not sizes.packed else (1,)
    good = any(same_dim(b, n) for n in entries) and h in (1, sizes.heads)
    if good and (own_rows or same_dim(rows, 1) or same_dim(rows, sizes.rows)):
        return
    allowed = f"[1 or {sizes.batch}, 1 or {sizes.heads}, 1 or {sizes.rows}, keys]"
    if sizes.packed:
        allowed = f"[1, 1 or {sizes.heads}, 1 or {sizes.rows} tokens, keys]"
        if not same_dim(sizes.batch, 1):
            allowed += f", or by sequence [{sizes.batch}, …]"
    raise check.fail(f"mask's dense array must have shape {allowed}, got {tuple(x.seen.shape)}")
