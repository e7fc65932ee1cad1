"""The implementations compared: what each can compute, and its calls.

A peer gets the same arrays and computes the same thing; a case that needs what it lacks is refused.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

import jax_flash

from .cases import Case, Inputs, needs
from .measure import copies_for

Attend = Callable[..., Any]  # (query, key, value, other arrays by name) → out
JAX_NN = {"GQA", "window", "lengths", "mask", "bias", "scale"}


class Refused(Exception):
    """The peer cannot run the case, or is not there."""


@dataclass(frozen=True)
class Peer:
    """An implementation: what it has, where it runs, the module it needs, and how it is called."""

    has: set[str] | None  # None: everything
    platforms: tuple[str, ...]
    make: Callable[[Case], Attend]
    module: str = "jax"

    def attend(self, case: Case) -> Attend:
        if jax.default_backend() not in self.platforms:
            raise Refused(f"runs on {', '.join(self.platforms)}")
        if importlib.util.find_spec(self.module) is None:
            raise Refused(f"{self.module} is not installed")
        lacking = set() if self.has is None else needs(case) - self.has
        if lacking:
            raise Refused(f"lacks {', '.join(sorted(lacking))}")
        return self.make(case)


def _ours(case: Case) -> Attend:
    if case.layout == "varlen":
        return lambda q, k, v, arrays: jax_flash.flash_attention_varlen(q, k, v, **arrays, **case.options)
    return lambda q, k, v, arrays: jax_flash.flash_attention(q, k, v, **arrays, **case.options)


def _jax_nn(implementation: str, function: str = "jax.nn") -> Callable[[Case], Attend]:
    """jax.nn.dot_product_attention, or another with its signature."""

    def make(case: Case) -> Attend:
        module: Any = importlib.import_module(function)
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
            """One row of all tokens under a block-diagonal mask: all that this interface offers."""
            rows, columns = (
                jnp.searchsorted(arrays[name], jnp.arange(x.shape[0]), side="right")
                for name, x in (("cu_seqlens_q", q), ("cu_seqlens_k", k))
            )
            mask = (rows[:, None] == columns[None, :])[None, None]
            return module.dot_product_attention(q[None], k[None], v[None], mask=mask, **options)[0]

        return attend

    return make


def _pallas(case: Case) -> Attend:
    from jax.experimental.pallas.ops.gpu.attention import mha

    return lambda q, k, v, arrays: mha(q, k, v, None, sm_scale=case.d**-0.5, causal=case.causal)


def _mosaic(case: Case) -> Attend:
    """JAX's Pallas kernel for Hopper, on float16 alone. It has no scale: it computes softmax(q kᵀ) v."""
    module: Any = importlib.import_module("jax.experimental.pallas.ops.gpu.attention_mgpu")
    keys = 64 if case.d > 128 else 128
    tiles = module.TuningConfig(block_q=64, block_kv=keys, max_concurrent_steps=2, causal=case.causal)
    return lambda q, k, v, arrays: module.attention(q, k, v, tiles)


def _torch(case: Case) -> Attend:
    torch: Any = importlib.import_module("torch")
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda q, k, v, arrays: attend(q, k, v, is_causal=case.causal, enable_gqa=case.hq != case.hk)


PEERS = {
    "jax_flash": Peer(None, ("cpu", "gpu"), _ours, "jax_flash"),
    "xla": Peer(JAX_NN | {"float32", "packed"}, ("cpu", "gpu"), _jax_nn("xla")),
    "cudnn": Peer(JAX_NN, ("gpu",), _jax_nn("cudnn")),
    "pallas": Peer({"float32"}, ("gpu",), _pallas),
    "mosaic": Peer({"GQA"}, ("gpu",), _mosaic),
    "tokamax": Peer(JAX_NN | {"dv", "softcap", "float32"}, ("gpu",), _jax_nn("mosaic", "tokamax"), "tokamax"),
    "torch": Peer({"GQA", "float32"}, ("cpu",), _torch, "torch"),
}


def calls(name: str, case: Case, pass_: str, inputs: list[Inputs]) -> tuple[Attend, list[Any]]:
    """The call of one pass, compiled, and the arguments that it goes through.

    The backward call starts from the forward's own residuals, so that it is the gradient's cost alone;
    "both" is a training step's cost: out and the gradients of query, key and value.
    """
    attend = PEERS[name].attend(case)
    if name == "torch":
        return _torch_calls(attend, pass_, inputs)
    arguments = [(*_qkv(x), _others(x)) for x in inputs]
    if name == "mosaic" and case.dtype == "bfloat16":
        arguments = jax.tree.map(lambda x: x.astype("float16"), arguments)
    if pass_ == "forward":
        return jax.jit(attend), arguments
    if pass_ == "both":

        def both(q: Any, k: Any, v: Any, arrays: Any, dout: Any) -> Any:
            out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, arrays), q, k, v)
            return out, pull(dout)

        return jax.jit(both), [(*a, x.dout) for a, x in zip(arguments, inputs, strict=True)]

    @jax.jit
    def pull(q: Any, k: Any, v: Any, arrays: Any) -> Any:
        return jax.vjp(lambda q, k, v: attend(q, k, v, arrays), q, k, v)[1]

    backward = jax.jit(lambda residuals, dout: residuals(dout))
    first = pull(*arguments[0]), inputs[0].dout
    copies = copies_for(first, jax.default_backend())  # residuals may be far larger than the inputs
    rest = zip(arguments[1:copies], inputs[1:copies], strict=True)
    return backward, [first, *((pull(*argument), x.dout) for argument, x in rest)]


def _qkv(inputs: Inputs) -> tuple[jax.Array, ...]:
    return tuple(inputs.positional[name] for name in ("query", "key", "value"))


def _others(inputs: Inputs) -> dict[str, Any]:
    return {k: v for k, v in inputs.positional.items() if k.startswith("cu_")} | inputs.keywords


def _torch_calls(attend: Attend, pass_: str, inputs: list[Inputs]) -> tuple[Attend, list[Any]]:
    """PyTorch in this process, in its own layout: [b, h, s, d], contiguous."""
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(len(os.sched_getaffinity(0)))

    def tensor(x: jax.Array) -> Any:
        return torch.utils.dlpack.from_dlpack(x.swapaxes(1, 2)).clone().requires_grad_()

    def forward(q: Any, k: Any, v: Any) -> None:
        with torch.no_grad():
            attend(q, k, v, {})

    def backward(out: Any, qkv: Any, dout: Any) -> None:
        torch.autograd.grad(out, qkv, dout, retain_graph=True)

    def both(q: Any, k: Any, v: Any, dout: Any) -> None:
        torch.autograd.grad(attend(q, k, v, {}), (q, k, v), dout)

    qkv = [tuple(map(tensor, _qkv(x))) for x in inputs]
    if pass_ == "forward":
        return forward, qkv
    if pass_ == "both":
        return both, [(*t, tensor(x.dout).detach()) for t, x in zip(qkv, inputs, strict=True)]
    return backward, [(attend(*t, {}), t, tensor(x.dout).detach()) for t, x in zip(qkv, inputs, strict=True)]
