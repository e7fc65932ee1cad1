"""`dot_product_attention`: a drop-in replacement for `jax.nn.dot_product_attention`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from . import validate
from ._jax import same_dim
from .autodiff import attend
from .batch_dims import local_window
from .checker import Checker
from .masks import Mask
from .options import DotProductOptions, FixedArguments, Implementation, IndexLike, Number
from .spec import AttentionSpec

_CHECK = Checker("dot_product_attention")


@dataclass(frozen=True, kw_only=True)
class DotProductArguments:
    """The arguments of `dot_product_attention`."""

    query: ArrayLike
    key: ArrayLike
    value: ArrayLike
    bias: ArrayLike | None = None
    mask: ArrayLike | Mask | None = None
    scale: Number | None = None
    is_causal: bool = False
    query_seq_lengths: IndexLike | None = None
    key_value_seq_lengths: IndexLike | None = None
    local_window_size: int | tuple[int, int] | None = None
    implementation: Implementation | None = None
    return_residual: bool = False


# fmt: off
@overload
def dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike,
    bias: ArrayLike | None = None, mask: ArrayLike | Mask | None = None,
    *, return_residual: Literal[False] = ..., **options: Unpack[DotProductOptions],
) -> Array: ...
@overload
def dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike,
    bias: ArrayLike | None = None, mask: ArrayLike | Mask | None = None,
    *, return_residual: Literal[True], **options: Unpack[DotProductOptions],
) -> tuple[Array, Array]: ...
@overload
def dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike,
    bias: ArrayLike | None = None, mask: ArrayLike | Mask | None = None,
    *, return_residual: bool, **options: Unpack[DotProductOptions],
) -> Array | tuple[Array, Array]: ...
# fmt: on
@overload  # with options from a dict, whose types mypy does not know one by one
def dot_product_attention(*arguments: Any, unpacked: Any, **options: Any) -> Any: ...


def dot_product_attention(  # type: ignore[misc]  # only an overload has `unpacked`
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | Mask | None = None,
    *,
    scale: Number | None = None,
    is_causal: bool = False,
    query_seq_lengths: IndexLike | None = None,
    key_value_seq_lengths: IndexLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Implementation | None = None,
    return_residual: bool = False,
) -> Array | tuple[Array, Array]:
    """Attention with the signature and meaning of `jax.nn.dot_product_attention`.

    Dimensions: B batch, T query length, S key length, N query heads, K KV heads (N is a multiple of K), H head dim.

    Args:
      query: `[B, T, N, H]` or `[T, N, H]`; float16, bfloat16 or float32 (and float64, see `implementation`).
      key, value: `[B, S, K, H]` or `[S, K, H]`, in query's dtype.
      bias: added to the logits, broadcastable to `[B, N, T, S]`. Differentiable.
      mask: boolean, broadcastable to `[B, N, T, S]`, True where a query may attend; or a value of `jax_flash.masks`.
      scale: a Python number, the factor of q·kᵀ; None is 1/√H.
      is_causal: query i attends to keys 0 … i, whatever the lengths (`align="top_left"`).
      query_seq_lengths, key_value_seq_lengths: int32 `[B]`, the valid prefix of each row; queries
        past it give 0.
      local_window_size: `(left, right)`, or one int for both; query i attends to keys i − left … i + right.
      implementation: None (this library's custom call for the platform), "cuda", "cpu", or "xla" (plain JAX).
        float64 always runs as plain JAX, so that it accepts only None and "xla".
      return_residual: also return log Σ exp(logits), `[B, T, N]` or `[T, N]`, in query's dtype and without gradient.

    Returns:
      An array with query's shape and dtype, or the pair `(out, residual)`.

    Raises:
      ValueError: for shapes, dtypes and options that jax.nn rejects too.
      TypeError: for lengths that are no integers, or int64 in JAX, and for dtypes that no implementation supports.
      NotImplementedError: for `implementation="cudnn"`, and for float64 with "cuda" or "cpu".

    Deviations from jax.nn: a query without a visible key gives 0 and residual −inf, not the mean of all values.
    Rows past the lengths are never read. A bias of −inf counts as masked.

    Source: the interface is jax.nn's; the algorithm is Dao, FlashAttention-2 (2023).

    Example:
      >>> out = dot_product_attention(q, k, v, is_causal=True, local_window_size=(128, 0))
    """
    arguments = DotProductArguments(
        query=query,
        key=key,
        value=value,
        bias=bias,
        mask=mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        implementation=implementation,
        return_residual=return_residual,
    )
    out, lse = attend(*spec_and_operands(_CHECK.op, arguments))
    shape = jnp.shape(query)
    out = out.reshape(shape)
    if not return_residual:
        return out
    residual = jax.lax.stop_gradient(lse).transpose(0, 2, 1).reshape(shape[:-1])
    return out, residual.astype(out.dtype)


def spec_and_operands(op: str, given: DotProductArguments) -> tuple[AttentionSpec, validate.Operands]:
    """The spec and operands of the flash_attention call that does the same as a dot_product_attention call."""
    if given.value is None:
        raise _CHECK.fail(
            "value must be an array, got None; pass key where V is K, or call flash_attention, which takes None",
            TypeError,
        )
    q, k, v = _rank4("query", given.query), _rank4("key", given.key), _rank4("value", given.value)
    _check_operands(q, k, v)
    batch = q.shape[0]
    scores = (batch, q.shape[2], q.shape[1], k.shape[1])
    arguments = FixedArguments(
        query=q,
        key=k,
        value=v,
        causal=_CHECK.flag("is_causal", given.is_causal),
        window=local_window(_CHECK, given.local_window_size),
        align="top_left",
        mask=given.mask if given.mask is None or isinstance(given.mask, Mask) else _mask(given.mask, scores),
        q_lengths=_lengths("query_seq_lengths", given.query_seq_lengths, batch),
        kv_lengths=_lengths("key_value_seq_lengths", given.key_value_seq_lengths, batch),
        scale=given.scale,
        bias=None if given.bias is None else _CHECK.bias("bias", given.bias, q.dtype),
        return_lse=_CHECK.flag("return_residual", given.return_residual),
        implementation=_implementation(given.implementation, q.dtype),
    )
    return validate.fixed(op, arguments)


def _rank4(name: str, x: ArrayLike) -> Array:
    x = _CHECK.array(name, x)
    if x.ndim not in (3, 4):
        raise _CHECK.fail(f"{name} has rank {x.ndim}; allowed are 3 (no batch) and 4")
    return x if x.ndim == 4 else x[None]


def _check_operands(query: Array, key: Array, value: Array) -> None:
    """The checks in which jax.nn is stricter than this library's other functions, or raises another error."""
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise _CHECK.fail(
                f"{name} has dtype {x.dtype}, which differs from query's {query.dtype}{validate.CAST}"
            )
    if not all(map(same_dim, value.shape, key.shape)):
        raise _CHECK.fail(f"value has shape {value.shape}, which differs from key's {key.shape}")


def _mask(given: ArrayLike, scores: tuple[Any, ...]) -> Array:
    mask = _CHECK.array("mask", given)
    if mask.dtype != jnp.bool_:
        raise _CHECK.fail(f"mask has dtype {mask.dtype}, allowed is bool; pass an additive mask as bias")
    hint = validate.OF_RANK_3 if mask.ndim == 3 else ""
    return _CHECK.broadcastable("mask", mask, scores, "b hq sq sk", hint)


def _lengths(name: str, given: IndexLike | None, batch: Any) -> Array | None:
    if given is None:
        return None
    lengths = _CHECK.int32(name, given)
    _CHECK.shape(name, lengths, (batch,), "B")
    return lengths


def _implementation(implementation: str | None, dtype: Any) -> Implementation | None:
    if implementation == "cudnn":
        raise _CHECK.fail(
            'implementation is "cudnn"; allowed are None, "cuda", "cpu" and "xla" '
            "(cuDNN's is in jax.nn.dot_product_attention)",
            NotImplementedError,
        )
    implementation = validate.implementation_name(_CHECK, implementation)
    if dtype != jnp.float64:
        return implementation
    if implementation not in (None, "xla"):
        raise _CHECK.fail(
            f'query is float64, which implementation="{implementation}" does not have; use "xla" or None',
            NotImplementedError,
        )
    return "xla"
