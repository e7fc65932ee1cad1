"""Masks as values: which keys each query row sees, as data by which kernels skip what is hidden.

A `Mask` is a pytree. It can be made once, passed through jit, scanned over, sharded and vmapped, and it combines with
others: `a & b` shows what both show, `a | b` what either shows. Its arrays are leaves, and Python ints belong to its
structure, so that programs are compiled for them. Key indices count from the first key of the batch entry or sequence.
Every mask holds arrays of at most O(rows) or O(blocks) elements, except `dense`.

A wrong argument raises ValueError or TypeError, whose message names the function, the argument and its value. The sizes
of arrays are checked by the call that takes the mask.

Example:
  >>> mask = masks.causal() & masks.segments(ids)  # ids int32 [b, s]
  >>> out = flash_attention(q, k, v, mask=mask)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .checker import Checker, is_int
from .pytrees import Static, pytree
from .visible import arrays as mask_arrays
from .visible import conjunctions, forms, joins
from .visible.forms import Form
from .visible.rows import MOST
from .visible.sizes import Sizes, check_sizes

ArrayLike = Any
_DRAWN = 16  # the most rows and keys in a picture
_MOST_DRAWN = 1 << 21  # the most pairs, of all entries and heads, of a mask that repr draws


@pytree("conditions")
@dataclass(frozen=True, eq=False)
class Mask:
    """Which keys each query row sees: a conjunction of conditions. Make one by the functions of this module.

    Masks are equal if they have the same conditions and numbers, and the same array objects.
    """

    conditions: tuple[Form, ...]

    def __and__(self, other: Mask) -> Mask:
        _require_mask("&", other)
        together = joins.merged((*self.conditions, *other.conditions))
        of_ranges = [x for x in together if conjunctions.most_pairs((x,)) is not None]
        if (conjunctions.most_pairs(of_ranges) or 1) > 2:
            raise ValueError(
                f"masks: {self!s} & {other!s} may leave a row three ranges of keys, allowed are two; "
                "masks.from_function(…) or masks.dense(…) takes any"
            )
        return Mask(together)

    __rand__ = __and__  # only reached with an array on the left, which raises

    def __or__(self, other: Mask) -> Mask:
        _require_mask("|", other)
        a, b = self.conditions, other.conditions
        if not (a and b):  # one shows everything
            return Mask(())
        if len(a) == len(b) == 1 and (joined := joins.joined(a[0], b[0])) is not None:
            return Mask((joined,))
        counts = conjunctions.most_pairs(a), conjunctions.most_pairs(b)
        if None in counts or counts[0] + counts[1] > 2:  # type: ignore[operator]
            raise ValueError(
                f"masks: {self!s} | {other!s} cannot be written as two ranges of keys a row; "
                "masks.from_function(…) or masks.dense(…) takes any"
            )
        return Mask((conjunctions.Either(a, b),))

    __ror__ = __or__

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[Any, ...]:
        arrays, structure = jax.tree.flatten(self)
        return structure, *map(id, arrays)

    def __bool__(self) -> bool:
        raise TypeError(
            "masks: a mask has no truth value; combine masks by & and |, and compare with None by `is`"
        )

    def picture(self, sq: int, sk: int | None = None, *, entry: int = 0, head: int = 0) -> list[str]:
        """A line of text for each of `sq` query rows, `#` where it sees the key, for one batch entry and head. Where
        all entries or heads are alike, any index is allowed."""
        check = Checker("masks: picture")
        sq, sk = (check.whole(name, n, least=0) for name, n in (("sq", sq), ("sk", sq if sk is None else sk)))
        b, h = jax.eval_shape(partial(self._seen, *_sizes(self.conditions))).shape[:2]
        b = max(b, *_entries(self.conditions))
        for condition in conjunctions.flat(self.conditions):
            check_sizes(check, condition, Sizes(b, h, h, sq, sk, sk))
        for name, index, size in (("entry", entry, b), ("head", head, h)):
            if not is_int(index) or index < 0 or index >= size > 1:
                raise check.fail(f"{name} must be an int in [0, {size}), the mask's own, got {index!r}")
        seen = np.asarray(self._seen(sq, sk))
        seen = np.broadcast_to(seen, (*seen.shape[:2], sq, sk))
        chosen = seen[min(entry, len(seen) - 1), min(head, seen.shape[1] - 1)]
        return ["".join(".#"[int(x)] for x in row) for row in chosen]

    def _seen(self, sq: int, sk: int) -> Array:
        return conjunctions.array_of(self.conditions, sq, sk)

    def __str__(self) -> str:
        return conjunctions.text_of(self.conditions)

    def __repr__(self) -> str:
        return "\n".join((f"Mask({self!s})", *self._corner()))

    def _corner(self) -> list[str]:
        """The first rows and keys of a small mask's picture; nothing of a mask that cannot be drawn."""
        try:
            sq, sk = _sizes(self.conditions)
            pairs = jax.eval_shape(partial(self._seen, sq, sk)).size
            if pairs > _MOST_DRAWN or any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(self)):
                return []
            return [row[:_DRAWN] for row in self.picture(sq, sk)[:_DRAWN]]
        except Exception:  # Arrays may be deleted or on other hosts, and trees of masks hold shapes or axes.
            return []


def causal(offset: int | ArrayLike = 0) -> Mask:
    """Keys at or before the diagonal, j ≤ i + offset.

    Args:
      offset: an int, which is compiled in, or an int32 scalar or `[b]`: a diagonal that is data.
    """
    return Mask((forms.Band(None, Static(0), _offset("causal", offset)),))


def window(
    left: int | ArrayLike | None, right: int | ArrayLike | None = None, offset: int | ArrayLike = 0
) -> Mask:
    """Keys i + offset − left ≤ j ≤ i + offset + right; a side that is None is unlimited.

    Args:
      left, right, offset: ints, which are compiled in, or int32 scalars or `[b]`, so that a scan over layers may have
        windows of its own.
    """
    sides = [
        None if x is None else _data("window", name, x) for name, x in (("left", left), ("right", right))
    ]
    return Mask((forms.Band(sides[0], sides[1], _offset("window", offset)),))


def segments(q_ids: ArrayLike, kv_ids: ArrayLike | None = None) -> Mask:
    """Keys of the row's own segment.

    Args:
      q_ids: int32 `[b, sq]`, packed `[tq]`.
      kv_ids: int32 `[b, sk]`, packed `[tk]`, for pages `[n, keys]` with as many keys as a row of the tables holds; by
        default q_ids. In packed and paged calls the keys of a segment must be neighbours (`check_inputs` checks it).
    """
    q = _per_token("segments", "q_ids", q_ids)
    return Mask((forms.Segments(q, q if kv_ids is None else _per_token("segments", "kv_ids", kv_ids)),))


def ranges(lo: ArrayLike, hi: ArrayLike) -> Mask:
    """Keys lo ≤ j < hi. `ranges(…) | ranges(…)` gives each row two ranges.

    Args:
      lo, hi: int32, broadcastable to `[b, h, sq]`; packed to `[h, tq]`.
    """
    if isinstance(lo, int) and isinstance(hi, int):  # no array, so that a mask of numbers starts no backend
        check = Checker("masks.ranges")
        first, end = (Static(check.host_int32(name, x)) for name, x in (("lo", lo), ("hi", hi)))
        return Mask((forms.Ranges(((first, end),)),))
    pair = _int32("ranges", "lo", lo), _int32("ranges", "hi", hi)
    try:
        limits = jnp.broadcast_arrays(*pair)
    except ValueError:
        shapes = " and ".join(str(x.shape) for x in pair)
        raise ValueError(f"masks.ranges: lo and hi must broadcast to one shape, got {shapes}") from None
    return Mask((forms.Ranges((forms.between(*limits),)),))


def by_position(
    q_positions: ArrayLike,
    kv_positions: ArrayLike,
    *,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
) -> Mask:
    """Causal and window by positions that are not indices (padding, caches, tokens left out).

    Where positions begin again in each document of a packed row, use the tokens' indices and `segment_ids` instead.

    Args:
      q_positions: int32 `[b, sq]`, packed `[tq]`.
      kv_positions: int32 `[b, sk]`, packed `[tk]`, for pages `[n, keys]` with as many keys as a row of the tables
        holds; they do not decrease among the keys of a row or sequence.
      causal: keys at or before the row's position.
      window: `(left, right)` around it, each an int ≥ 0 or None for unlimited.
    """
    left, right = _sides("by_position", window)
    is_causal = Checker("masks.by_position").flag("causal", causal)
    return Mask(
        (
            forms.Positions(
                _per_token("by_position", "q_positions", q_positions),
                _per_token("by_position", "kv_positions", kv_positions),
                left,
                Static(0) if is_causal else right,
            ),
        )
    )


def prefix_lm(lengths: int | ArrayLike) -> Mask:
    """Causal, and everything before `lengths` (int32 `[b]`, or one int)."""
    return Mask((forms.Prefix(_data("prefix_lm", "lengths", lengths)),))


def bidirectional_spans(ids: ArrayLike) -> Mask:
    """Causal, but bidirectional within a span, such as an image in a text.

    Args:
      ids: int32 `[b, s]`: neighbours with the same id ≥ 0 are one span, a negative id is none.
    """
    return Mask((forms.Spans(_int32("bidirectional_spans", "ids", ids, (1, 2))),))


def chunked(size: int) -> Mask:
    """Causal within chunks of `size` keys (Llama 4)."""
    return Mask((forms.Chunks(_positive("chunked", "size", size)),))


def first_and_window(first: int | ArrayLike, left: int | ArrayLike) -> Mask:
    """Causal: the first keys, and a window of `left` keys before the row's own (StreamingLLM)."""
    name = "first_and_window"
    return Mask((forms.FirstAndWindow(_data(name, "first", first), _data(name, "left", left)),))


def block_diffusion(block: int) -> Mask:
    """Block diffusion's training mask. A row is n noised tokens, then the n clean ones, in blocks of `block`; n is half
    of the keys, or of kv_lengths.

    A noised query of block b sees the noised keys of b and the clean keys of blocks before b; a clean one sees the
    clean keys of blocks up to b.
    """
    return Mask((forms.Diffusion(_positive("block_diffusion", "block", block)),))


def blocks(chosen: ArrayLike, block: tuple[int, int]) -> Mask:
    """Blocks of keys chosen for each block of queries.

    Args:
      chosen: int32 `[b|1, hk|hq|1, ⌈sq/bq⌉, n]`: indices of visible key blocks in any order, −1 for none. An index that
        occurs twice counts once. In packed calls b is the sequences, whose blocks count from their own first row, and
        rows past the last block see no key.
      block: `(bq, bk)`, multiples of 16 from 16 to 256.
    """
    if not isinstance(block, (tuple, list)) or len(block) != 2:
        raise TypeError(f"masks.blocks: block must be a pair (rows, keys), got {block!r}")
    for size in block:
        if _positive("blocks", "block", size) % 16 or size > 256:
            raise ValueError(f"masks.blocks: block has {size}, allowed are multiples of 16 from 16 to 256")
    return Mask((forms.Blocks(_int32("blocks", "chosen", chosen, (4,)), (int(block[0]), int(block[1]))),))


def dense(array: ArrayLike) -> Mask:
    """A boolean `[b|1, hq|1, sq|1, sk|1]`, True where a row sees a key.

    Keys count from the first of the batch entry or sequence. Packed calls take rows that are packed tokens,
    `[1, hq|1, tq|1, keys|1]`, or rows of each of n > 1 sequences, `[n, hq|1, rows|1, keys|1]`. In these and over pages
    the array may have any number of keys (and of a sequence's rows); past them no row sees a key.
    """
    x = Checker("masks.dense").array("array", array)
    if x.dtype != jnp.bool_ or x.ndim != 4:
        raise TypeError(f"masks.dense: array must be boolean of rank 4, got {x.dtype} of shape {x.shape}")
    return Mask((forms.Dense(x),))


def from_function(f: Callable[..., Any], sq: int, sk: int, *, batch: int = 1, heads: int = 1) -> Mask:
    """The mask of a function of indices, which is evaluated once here and kept in as little memory as it allows: as
    ranges if a row has at most two, as blocks of 128 or 256 if it consists of these, else as a boolean array.

    Args:
      f: takes `(b, h, i, j)`, integer arrays of NumPy that broadcast against each other, and returns booleans.
      sq, sk, batch, heads: the sizes for which it is evaluated, in the fixed layout those of the call. In packed calls
        b is the sequence, i and j count from its first row and key, and rows past sq see no key.
    """
    name, shape = "from_function", (batch, heads, sq, sk)
    for which, given in zip(("batch", "heads", "sq", "sk"), shape):
        if not is_int(given) or given < 0:
            raise ValueError(f"masks.{name}: {which} must be an int of at least 0, got {given!r}")
    if not callable(f):
        raise TypeError(f"masks.{name}: f must be a function of (b, h, i, j), got {f!r}")
    seen = mask_arrays.evaluated(Checker(f"masks.{name}"), f, shape)
    if (pairs := mask_arrays.ranges_of(seen)) is not None:
        limits = tuple(forms.between(*map(jnp.asarray, pair)) for pair in pairs)
        return Mask((forms.Ranges(limits, int(sk)),))
    if (found := mask_arrays.blocks_of(seen)) is not None:
        chosen, size = found
        return Mask((forms.Blocks(jnp.asarray(chosen), (size, size), int(sk)),))
    return Mask((forms.Dense(jnp.asarray(seen), by_sequence=True),))


# --- checks ----------------------------------------------------------------------------------------------------------


def _require_mask(operator: str, other: Any) -> None:
    if not isinstance(other, Mask):
        raise TypeError(
            f"masks: {operator} takes two values of jax_flash.masks, got {type(other).__name__}; "
            "masks.dense(…) makes one of a boolean [b, hq, sq, sk]"
        )


def _int32(function: str, name: str, x: ArrayLike, ranks: Sequence[int] | None = None) -> Array:
    """An index array: int32, or integers on the host whose values int32 holds."""
    check = Checker(f"masks.{function}")
    array = check.int32(name, x)
    if ranks is not None and array.ndim not in ranks:
        raise check.fail(f"{name} must have rank {' or '.join(map(str, ranks))}, got shape {array.shape}")
    return array


def _per_token(function: str, name: str, x: ArrayLike) -> Array:
    """An index array of rank 2; an array of a packed batch becomes one row."""
    return jnp.atleast_2d(_int32(function, name, x, (1, 2)))


def _data(function: str, name: str, x: int | ArrayLike) -> int | Array:
    """A number, or one for each batch entry. One that int32 does not hold is further than any key."""
    if is_int(x):
        return Static(max(-MOST, min(int(x), MOST)))
    return _int32(function, name, x, (0, 1))


def _offset(function: str, x: int | ArrayLike) -> int | Array:
    """A diagonal. One that int32 does not hold has no other to stand for it, since a window may be as large."""
    if is_int(x) and not -MOST <= x <= MOST:
        raise ValueError(f"masks.{function}: offset must be within ±{MOST}, got {x}")
    return _data(function, "offset", x)


def _sides(function: str, window: Any) -> list[int | Array | None]:
    """The sides of a window around a position."""
    if window is None:
        return [None, None]
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"masks.{function}: window must be None or a pair (left, right), got {window!r}")
    for name, x in zip(("left", "right"), window):
        if is_int(x) and x < 0:
            raise ValueError(f"masks.{function}: window's {name} must be ≥ 0, or None for unlimited, got {x}")
    sides = zip(("window's left", "window's right"), window)
    return [None if x is None else _data(function, name, x) for name, x in sides]


def _positive(function: str, name: str, x: Any) -> int:
    if isinstance(x, jax.core.Tracer):
        raise TypeError(
            f"masks.{function}: {name} is compiled in, so it must be an int, got {x}; make it a static argument of "
            "jax.jit"
        )
    if not is_int(x) or x < 1:
        raise ValueError(f"masks.{function}: {name} must be an int of at least 1, got {x!r}")
    return min(int(x), MOST)


# --- text ------------------------------------------------------------------------------------------------------------


def _sizes(conditions: tuple[Form, ...]) -> tuple[int, int]:
    """The numbers of rows and keys in the arrays of a mask; 8 if no array tells."""
    each = [*conjunctions.flat(conditions)]
    rows, keys = (max(sizes) for sizes in zip((0, 0), *(x.extent() for x in each)))
    # The last block may be longer than the rows.
    of_blocks = [x.chosen.shape[-2] * x.block[0] for x in each if isinstance(x, forms.Blocks)]
    rows = rows or max(of_blocks, default=0) or 8
    return rows, keys or rows


def _entries(conditions: tuple[Form, ...]) -> list[int]:
    """The numbers of batch entries in arrays that need not hide anything, so that what is seen may be the same for
    all entries."""
    each = [*conjunctions.flat(conditions)]
    data = [jnp.shape(x.offset) for x in each if isinstance(x, forms.Band)]
    rows = [
        y.shape[:-1] for x in each if isinstance(x, forms.Positions) for y in (x.q_positions, x.kv_positions)
    ]
    return [1, *(shape[0] for shape in (*data, *rows) if shape)]
