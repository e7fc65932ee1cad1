"""The kernels of `compat.splash`: masks of `splash_masks` as options and operands of flash_attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from .. import masks
from ..attention import flash_attention
from ..checker import Checker
from ..options import ArrayLike, Implementation, Number
from . import arguments, costs
from .splash_masks import Band, Found, NumpyMask, structure

_CHECK = Checker("splash")


class QKVLayout(IntEnum):
    """Splash's layouts. Code that makes BlockSizes still works, but they have no effect."""

    HEAD_DIM_MINOR = 1
    SEQ_MINOR = 2


@dataclass(frozen=True)
class BlockSizes:
    """Splash's tile sizes. Code that makes them still works, but they have no effect."""

    block_q: int
    block_kv: int
    block_kv_compute: int | None = None
    block_q_dkv: int | None = None
    block_kv_dkv: int | None = None
    block_kv_dkv_compute: int | None = None
    block_q_dq: int | None = None
    block_kv_dq: int | None = None
    use_fused_bwd_kernel: bool = False
    q_layout: QKVLayout = QKVLayout.HEAD_DIM_MINOR
    k_layout: QKVLayout = QKVLayout.HEAD_DIM_MINOR
    v_layout: QKVLayout = QKVLayout.HEAD_DIM_MINOR

    @classmethod
    def get_default(cls) -> BlockSizes:
        return cls(128, 128)


DATA_FIELDS = ("ranges", "dense")
META_FIELDS = ("band", "shape", "shards", "is_mqa", "save_residuals", "softcap", "name", "implementation")


@partial(jax.tree_util.register_dataclass, data_fields=DATA_FIELDS, meta_fields=META_FIELDS)
@dataclass(frozen=True, eq=False)
class SplashAttentionKernel:
    """Attention with a mask of its own: `kernel(q, k, v, segment_ids=None, sinks=None)`. A pytree, whose arrays are
    those of the mask, so that it can be an argument of jit and shard_map.

    Args of a call:
      q: `[hq, sq, d]`, float16, bfloat16 or float32. It is not scaled: multiply it by 1/√d.
      k, v: `[hk, sk, d]` and `[hk, sk, dv]`, q's dtype; of an MQA kernel without heads, `[sk, d]` and `[sk, dv]`.
      segment_ids: `SegmentIds` of this module or JAX's, of `[sq]` and `[sk]`.
      sinks: `[hq]`, logits that take part in the softmax sum only. Differentiable.

    Returns:
      `[hq, sq, dv]` in q's dtype; with save_residuals the pair `(out, (logsumexp,))`, float32 `[hq, sq]`, which is
      differentiable here. `jax.vmap` adds batch dims.

    One deviation: a query without a visible key gives 0 and −inf, for which Splash's result is undefined.
    """

    ranges: tuple[tuple[Any, Any], ...]  # one or two pairs of int32 [1, hq|1, sq]
    dense: Any  # boolean [1, hq|1, sq, sk], or None
    band: Band
    shape: tuple[Any, ...]  # query heads, queries, keys
    shards: tuple[int, int]  # devices that split heads, and queries
    is_mqa: bool
    save_residuals: bool
    softcap: Number | None
    name: str | None
    implementation: Implementation | None

    def __call__(
        self,
        q: ArrayLike,
        k: ArrayLike,
        v: ArrayLike,
        segment_ids: Any = None,
        sinks: ArrayLike | None = None,
    ) -> Any:
        query = arguments.ranked(_CHECK, "q", q, "hq sq d")
        of_keys = "sk {}" if self.is_mqa else "hk sk {}"
        key, value = (
            arguments.ranked(_CHECK, name, x, of_keys.format(d))
            for name, x, d in (("k", k, "d"), ("v", v, "dv"))
        )
        if self.is_mqa:
            key, value = key[None], value[None]
        self._check("q", "heads", query.shape[0], 0)
        self._check("q", "queries", query.shape[1], 1)
        self._check("k", "keys", key.shape[1], 2)
        if sinks is not None:
            sinks = _CHECK.array("sinks", sinks)
            _CHECK.shape("sinks", sinks, query.shape[:1], "hq")
            sinks = sinks.astype(jnp.float32)
        out, lse = flash_attention(
            *(x.swapaxes(0, 1)[None] for x in (query, key, value)),
            mask=self._mask(),
            segment_ids=None if segment_ids is None else _segments(segment_ids, query, key),
            align="top_left",
            scale=1.0,
            softcap=self.softcap,
            sinks=sinks,
            return_lse=True,
            implementation=self.implementation,
        )
        found = out[0].swapaxes(0, 1), lse[0]
        if self.name is not None:
            found = tuple(checkpoint_name(x, self.name) for x in found)
        return (found[0], (found[1],)) if self.save_residuals else found[0]

    def _check(self, name: str, axis: str, got: Any, dim: int) -> None:
        whole = self.shape[dim]
        allowed = [whole] + [whole // x for x in self.shards[dim : dim + 1] if x > 1]
        if got not in allowed:
            raise _CHECK.fail(f"{name} has {got} {axis}, the mask has {' or '.join(map(str, allowed))}")

    def _mask(self) -> masks.Mask | None:
        if self.dense is not None:
            return masks.dense(self.dense)
        if self.ranges:
            one, *other = (masks.ranges(*x) for x in self.ranges)
            return one | other[0] if other else one
        if self.band == Band():
            return None
        found = masks.window(self.band.left, self.band.right)
        return found if self.band.chunk is None else masks.chunked(self.band.chunk) & found

    def manual_sharding_spec(self, sharding: NamedSharding) -> SplashAttentionKernel:
        """The kernel's specs as an argument of shard_map, where heads and queries are split as `sharding` says."""
        spec = (*sharding.spec, None, None)
        if len(sharding.spec) > 2:
            raise _CHECK.fail(
                f"sharding must be of heads and queries, got {sharding.spec}; keys are not split"
            )
        for dim, of in enumerate(("head_shards", "q_seq_shards")):
            axes = spec[dim] if isinstance(spec[dim], tuple) else (spec[dim],)
            count = int(np.prod([sharding.mesh.shape[x] for x in axes if x is not None]))
            if count != self.shards[dim]:
                raise _CHECK.fail(
                    f"sharding splits by {count} what the kernel was made for with {of} {self.shards[dim]}"
                )

        def of_leaf(x: Any) -> PartitionSpec:
            return PartitionSpec(None, spec[0] if x.shape[1] > 1 else None, spec[1])

        specs: SplashAttentionKernel = jax.tree.map(of_leaf, self)
        return specs


def make_splash_mha(
    mask: Any,
    *,
    block_sizes: Any = None,
    save_residuals: bool = False,
    mask_value: float | None = None,
    attn_logits_soft_cap: Number | None = None,
    downcast_smem_data: bool = True,
    head_shards: int,
    q_seq_shards: int,
    residual_checkpoint_name: str | None = None,
    interpret: bool = False,
    implementation: Implementation | None = None,
) -> SplashAttentionKernel:
    """A kernel for one mask, with the arguments of `make_splash_mha` of JAX's Splash attention.

    Args:
      mask: a `MultiHeadMask` with a mask for each query head, of this module's classes, JAX's, or any with a shape and
        slices; or a boolean array `[hq, sq, sk]`. Kernels skip what these masks hide: full, causal, local and chunked
        ones and their `&`, which become options of the call, and any other mask that leaves each query one or two
        ranges of keys, which takes two integers per range. Other masks stay dense, with a warning, as do traced arrays.
      save_residuals: calls also return the log-sum-exp.
      attn_logits_soft_cap: c in `S ← c·tanh(S/c)`.
      head_shards, q_seq_shards: devices over which shard_map splits heads and queries (`manual_sharding_spec`).
      residual_checkpoint_name: a name for remat policies of out and lse. The backward reads residuals named
        `flash_out` and `flash_lse`, which a policy should save.
      block_sizes, mask_value, downcast_smem_data, interpret: have no effect.
      implementation: as in `flash_attention`.

    Returns:
      A `SplashAttentionKernel`.

    Raises:
      ValueError, TypeError, NotImplementedError: as in `flash_attention`.

    Source: the interface is JAX's; the algorithm is Dao, FlashAttention-2 (2023).

    Example:
      >>> mask = MultiHeadMask([CausalMask((s, s)) for _ in range(heads)])
      >>> out = jax.vmap(make_splash_mha(mask, head_shards=1, q_seq_shards=1))(q / d**0.5, k, v)
    """
    del block_sizes, mask_value, downcast_smem_data, interpret
    shape = tuple(getattr(mask, "shape", ()))
    if len(shape) != 3:
        raise _CHECK.fail(
            f"mask must be a MultiHeadMask or a boolean array, of shape [hq, sq, sk], got {type(mask).__name__} of "
            f"shape {shape}"
        )
    shards = _CHECK.whole("head_shards", head_shards), _CHECK.whole("q_seq_shards", q_seq_shards)
    for name, count, size in zip(("head_shards", "q_seq_shards"), shards, shape):
        if count < 1 or size % count:
            raise _CHECK.fail(f"{name} is {count}, allowed are divisors of the mask's {size}")
    kernel = SplashAttentionKernel(
        (),
        None,
        Band(),
        shape,
        shards,
        False,
        _CHECK.flag("save_residuals", save_residuals),
        attn_logits_soft_cap,
        residual_checkpoint_name,
        implementation,
    )
    if isinstance(mask, jax.core.Tracer):
        _CHECK.dtype("mask", mask, ("bool",), "; True is where a query sees a key")
        return replace(kernel, dense=_dense(mask, "it is traced"))
    heads = [NumpyMask(x) for x in np.asarray(mask)] if not hasattr(mask, "masks") else list(mask.masks)
    found = _of_heads(heads)
    if shards[1] > 1:  # each device has its own rows
        found = [x.ranges(*shape[1:]) if isinstance(x, Band) else x for x in found]
    if len(found) == 1 and isinstance(found[0], Band):
        return replace(kernel, band=found[0])
    arrays = [x.ranges(*shape[1:]) if isinstance(x, Band) else x for x in found]
    if all(x.ndim == 3 for x in arrays):
        most = max(map(len, arrays))
        both = np.stack([np.pad(x, ((0, most - len(x)), (0, 0), (0, 0))) for x in arrays], 2)
        return replace(kernel, ranges=tuple((lo[None], hi[None]) for lo, hi in both))
    whole = np.stack([np.asarray(x[:, :], bool) for x in heads[: len(found)]])
    return replace(kernel, dense=_dense(whole, "a query of it sees keys in more than two ranges"))


def make_splash_mqa(mask: Any, **options: Any) -> SplashAttentionKernel:
    """`make_splash_mha` for keys and values of one head, passed without a dimension for it: `[sk, d]`, `[sk, dv]`."""
    return replace(make_splash_mha(mask, **options), is_mqa=True)


def make_splash_mha_single_device(mask: Any, **options: Any) -> SplashAttentionKernel:
    """`make_splash_mha` with head_shards and q_seq_shards 1 by default."""
    return make_splash_mha(mask, **{"head_shards": 1, "q_seq_shards": 1, **options})


def make_splash_mqa_single_device(mask: Any, **options: Any) -> SplashAttentionKernel:
    """`make_splash_mqa` with head_shards and q_seq_shards 1 by default."""
    return make_splash_mqa(mask, **{"head_shards": 1, "q_seq_shards": 1, **options})


def _of_heads(heads: list[Any]) -> list[Found]:
    """The structure of each head's mask, or one for all heads if they are equal."""
    known: dict[int, Found] = {}
    for x in heads:
        if id(x) not in known:
            known[id(x)] = structure(x)
    found = [known[id(x)] for x in heads]
    return found[:1] if all(_same(found[0], x) for x in found[1:]) else found


def _same(a: Found, b: Found) -> bool:
    if isinstance(a, Band) or isinstance(b, Band):
        return isinstance(a, Band) and isinstance(b, Band) and a == b
    return a is b or (a.dtype == b.dtype and np.array_equal(a, b))


def _dense(seen: Any, why: str) -> Any:
    costs.warn_dense(
        _CHECK,
        "mask",
        why,
        seen.shape,
        "masks of at most two ranges of keys a query cost two integers a range",
    )
    return seen.astype(bool)[None]


def _segments(ids: Any, query: Array, key: Array) -> tuple[Array, Array]:
    of_queries, of_keys = arguments.segment_ids(_CHECK, ids)
    found = []
    for name, x, array in (("q", of_queries, query), ("kv", of_keys, key)):
        numbers = _CHECK.int32(f"segment_ids.{name}", x)
        _CHECK.shape(f"segment_ids.{name}", numbers, array.shape[1:2], "sq" if name == "q" else "sk")
        found.append(numbers[None])
    return found[0], found[1]
