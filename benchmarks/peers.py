"""The implementations compared, each a function (query, key, value) → out, or the reason it cannot run.

A peer gets the same arrays and computes the same thing; what it has no argument for it refuses.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import jax_flash

from .cases import Case
from .measure import copies_for

Attend = Callable[..., Any]


class Refused(Exception):
    """The peer cannot run the case, or is not there."""


def ours(case: Case) -> Attend:
    """This library's kernels for the platform."""
    if case.lengths:
        return partial(jax_flash.flash_attention_varlen, cu_seqlens_q=case.cu_seqlens(), causal=case.causal)
    return partial(jax_flash.flash_attention, causal=case.causal, window=case.window)


def jax_nn(case: Case, implementation: str) -> Attend:
    """jax.nn.dot_product_attention; packed sequences as one row with a block-diagonal mask."""
    attend = partial(jax.nn.dot_product_attention, implementation=implementation, is_causal=case.causal)
    if case.lengths:
        if implementation != "xla":
            raise Refused("no packed sequences through jax.nn")
        ids = jnp.repeat(jnp.arange(len(case.lengths)), jnp.array(case.lengths), total_repeat_length=case.sq)
        same = ids[:, None] == ids[None, :]
        return lambda q, k, v: attend(q[None], k[None], v[None], mask=same[None, None])[0]
    if case.causal and case.sq != case.sk:
        raise Refused("causal is top-left aligned, the case is not")
    if case.window is None:
        return attend
    left, right = case.window
    if left is None or right is None:
        raise Refused("no one-sided window")
    return partial(attend, local_window_size=(left, right))


def cudnn(case: Case) -> Attend:
    if jax.default_backend() != "gpu":
        raise Refused("needs a GPU")
    if case.dtype == "float32":
        raise Refused("float16 and bfloat16 only")
    return jax_nn(case, "cudnn")


def pallas(case: Case) -> Attend:
    """JAX's own Pallas kernel for GPUs, at its default block sizes."""
    if jax.default_backend() != "gpu":
        raise Refused("needs a GPU")
    if case.lengths or case.window or case.heads != case.kv_heads or case.sq != case.sk:
        raise Refused("no GQA, windows, packed or unequal lengths")
    from jax.experimental.pallas.ops.gpu.attention import mha

    return lambda q, k, v: mha(q, k, v, None, sm_scale=case.d**-0.5, causal=case.causal)


def tokamax(case: Case) -> Attend:
    if importlib.util.find_spec("tokamax") is None:
        raise Refused("not installed")
    if case.lengths or (case.causal and case.sq != case.sk):
        raise Refused("no packed sequences, causal is top-left aligned")
    module: Any = importlib.import_module("tokamax")
    return partial(module.dot_product_attention, is_causal=case.causal, local_window_size=case.window)


PEERS: dict[str, Callable[[Case], Attend]] = {
    "jax_flash": ours,
    "xla": partial(jax_nn, implementation="xla"),
    "cudnn": cudnn,
    "pallas": pallas,
    "tokamax": tokamax,
}


def calls(name: str, case: Case, pass_: str, arguments: list[tuple[Any, ...]]) -> tuple[Attend, list[Any]]:
    """The call of one pass, compiled, and the arguments that it goes through.

    The backward call starts from the forward's own residuals, so that it is the gradient's cost alone.
    """
    if name == "torch":
        return torch_calls(case, pass_, arguments)
    attend = PEERS[name](case)
    if pass_ == "forward":
        return jax.jit(attend), [(q, k, v) for q, k, v, _ in arguments]
    pull = jax.jit(lambda q, k, v: jax.vjp(attend, q, k, v)[1])
    backward = jax.jit(lambda residuals, dout: residuals(dout))
    first = pull(*arguments[0][:3]), arguments[0][3]
    copies = copies_for(first, jax.default_backend())  # residuals may be far larger than the inputs
    return backward, [first, *((pull(q, k, v), dout) for q, k, v, dout in arguments[1:copies])]


def torch_calls(case: Case, pass_: str, arguments: list[tuple[Any, ...]]) -> tuple[Attend, list[Any]]:
    """PyTorch's scaled_dot_product_attention on the CPU, in this process."""
    if importlib.util.find_spec("torch") is None:
        raise Refused("not installed")
    if jax.default_backend() != "cpu":
        raise Refused("compared on the CPU only")
    if case.lengths or case.window or (case.causal and case.sq != case.sk):
        raise Refused("no packed sequences, windows or bottom-right causal")
    torch: Any = importlib.import_module("torch")

    def tensor(x: jax.Array) -> Any:  # [b, s, h, d] → torch's [b, h, s, d]
        return torch.utils.dlpack.from_dlpack(x).clone().transpose(1, 2).requires_grad_()

    def attend(q: Any, k: Any, v: Any) -> Any:
        gqa = case.heads != case.kv_heads
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=case.causal, enable_gqa=gqa
        )

    def forward(q: Any, k: Any, v: Any) -> None:
        with torch.no_grad():
            attend(q, k, v)

    def backward(out: Any, inputs: Any, dout: Any) -> None:
        torch.autograd.grad(out, inputs, dout, retain_graph=True)

    converted = [tuple(map(tensor, argument)) for argument in arguments]
    if pass_ == "forward":
        return forward, [(q, k, v) for q, k, v, _ in converted]
    return backward, [(attend(q, k, v), (q, k, v), dout) for q, k, v, dout in converted]
