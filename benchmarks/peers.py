"""The implementations compared: what each can compute, and its calls.

A peer gets the same arrays and computes the same results. If it lacks an option of a case, it does not run the case,
and the report names the option.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Container
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from . import adapters
from .adapters import Attend, Refused
from .cases import Case, Inputs, make_inputs
from .measure import copies_for

JAX_NN = {"GQA", "window", "lengths", "mask", "bias", "scale"}
Finish = Callable[[], tuple[Any, list[Any]]]  # returns a compiled call and its argument tuples
DIFFERENTIATED = ("bias", "sinks")  # their gradients are timed together with those of query, key and value
FLASH_ATTN = {"GQA", "window", "packed", "scale", "bottom-right"}


@dataclass(frozen=True)
class Peer:
    """An implementation: its options, its platforms, the module that it needs, and how it is called."""

    has: set[str] | None  # options as needs() names them; None: all options
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


PEERS = {
    "jax_flash": Peer(None, ("cpu", "gpu"), adapters.ours, "jax_flash"),
    "xla": Peer(JAX_NN | {"float32", "packed"}, ("cpu", "gpu"), adapters.jax_nn("xla")),
    "cudnn": Peer(JAX_NN, ("gpu",), adapters.jax_nn("cudnn")),
    "fa4-jax": Peer(FLASH_ATTN | {"dv"}, ("gpu",), adapters.fa4_jax, "fa4_jax"),
    "flash-attn3-jax": Peer(FLASH_ATTN, ("gpu",), adapters.flash_attn3_jax, "flash_attn3_jax"),
    "dew-flash-attn": Peer(FLASH_ATTN | {"sinks"}, ("gpu",), adapters.dew_flash_attn, "dew_flash_attn"),
    "jla": Peer({"GQA", "window", "packed", "scale", "dv", "sinks"}, ("gpu",), adapters.jla("ranged"), "jla"),
    "jla fused": Peer({"GQA", "window", "packed", "scale", "sinks"}, ("gpu",), adapters.jla("fused"), "jla"),
    "tokamax": Peer(JAX_NN | {"dv", "softcap", "float32"}, ("gpu",), adapters.tokamax, "tokamax"),
    "pallas": Peer({"float32"}, ("gpu",), adapters.pallas),
    "mosaic": Peer({"GQA"}, ("gpu",), adapters.mosaic),
    "torch": Peer({"GQA", "float32"}, ("cpu",), adapters.torch, "torch"),
}

# Other forms of this library, for the cells that name them.
VARIANTS = {
    "deterministic": Peer(None, ("cpu", "gpu"), partial(adapters.ours, deterministic=True), "jax_flash"),
    "segment ids": Peer(None, ("cpu", "gpu"), adapters.ours_by_segments, "jax_flash"),
}


def needs(case: Case) -> set[str]:
    """The options that an implementation must have to compute the case."""
    wanted = {
        "packed": case.layout == "varlen",
        "GQA": case.hq != case.hk,
        "dv": case.d != case.dv,
        "float32": case.dtype == "float32",
        "window": case.window is not None,
        "bottom-right": case.align == "bottom_right" and case.sq != case.sk and (case.causal or case.window),
        "lengths": case.q_lengths is not None or case.kv_lengths is not None,
        "segments": case.segments > 0,
        "mask": case.mask is not None,
        "bias": case.bias is not None,
        "ALiBi": case.alibi_slopes is not None,
        "sinks": case.sinks,
        "scale": case.scale is not None,
        "softcap": case.softcap is not None,
        "dropout": case.dropout_rate > 0,
    }
    return {name for name, want in wanted.items() if want}


def prepare(
    what: dict[Any, tuple[str, Case, str]], raise_own: bool = True
) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Compiles key → (peer, case, pass) in parallel; returns the calls, and the reasons of those that do not run.

    The reason is the error of the first call. Errors of this library are raised if `raise_own`.
    """
    each = {case.name: case for _, case, _ in what.values()}
    with ThreadPoolExecutor(_workers()) as pool:
        drawn = dict(zip(each, pool.map(draw_inputs, each.values()), strict=True))

    def compile_one(name: str, case: Case, pass_: str) -> Finish:
        compile_it, finish = _in_two_steps(name, case, pass_, drawn[case.name])
        compile_it()
        return finish

    own = {
        key for key, (name, _, _) in what.items() if raise_own and (name == "jax_flash" or name in VARIANTS)
    }
    return compiled_side_by_side({key: partial(compile_one, *request) for key, request in what.items()}, own)


def _workers() -> int | None:
    return None if jax.default_backend() == "gpu" else 1


def compiled_side_by_side(
    jobs: dict[Any, Callable[[], Finish]], raised: Container[Any] = ()
) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Runs jobs, each of which compiles a program and returns its Finish. Returns the calls, and the reasons of those
    that fail.

    All programs are compiled before the first is called. They are called one by one, because a call may be captured as
    a CUDA graph, which fails if another thread uses the device meanwhile. Errors of the jobs in `raised` are raised.
    """

    def begin(job: Callable[[], Finish]) -> Finish | Exception:
        try:
            return job()
        except Exception as error:  # each library raises its own kinds of errors
            return error

    with ThreadPoolExecutor(_workers()) as pool:
        begun = dict(zip(jobs, pool.map(begin, jobs.values()), strict=True))
    calls: dict[Any, Any] = {}
    refused: dict[Any, Any] = {}
    for key, finish in begun.items():
        try:
            if isinstance(finish, Exception):
                raise finish
            call, arguments = finish()
            jax.block_until_ready(call(*arguments[0]))
            calls[key] = call, arguments
        except Exception as error:
            if key in raised:
                raise
            refused[key] = {"refused": why(error)}
    return calls, refused


def why(error: Exception) -> str:
    """The reason in the report: the option that a peer lacks, or the error of its first call."""
    text = (str(error).strip() or repr(error)).splitlines()[0][:200]
    return text if isinstance(error, Refused) else f"{type(error).__name__}: {text}"


def draw_inputs(case: Case) -> list[Inputs]:
    """As many inputs as fill the rotation."""
    platform = jax.default_backend()
    first = make_inputs(case, 0, on_device=platform == "gpu")
    copies = copies_for((first.positional, first.dout), platform)
    others = (make_inputs(case, seed, on_device=platform == "gpu") for seed in range(1, copies))
    return [first, *others]


def calls(name: str, case: Case, pass_: str, inputs: list[Inputs]) -> tuple[Attend, list[Any]]:
    """The call of one pass of a peer, and the arguments that it cycles through."""
    return _in_two_steps(name, case, pass_, inputs)[1]()


def _in_two_steps(
    name: str, case: Case, pass_: str, inputs: list[Inputs]
) -> tuple[Callable[[], None], Finish]:
    """A function that compiles the call of one pass of a peer, and one that returns the call."""
    attend = (PEERS | VARIANTS)[name].attend(case)
    if name == "torch":
        return lambda: None, lambda: _torch_calls(attend, pass_, inputs)
    if name == "mosaic" and case.dtype == "bfloat16":
        inputs = jax.tree.map(lambda x: x.astype("float16"), [vars(x) for x in inputs])
        inputs = [Inputs(**x) for x in inputs]
    return _pass_in_two_steps(attend, pass_, inputs)


def pass_calls(attend: Attend, pass_: str, inputs: list[Inputs]) -> tuple[Attend, list[Any]]:
    """The call of one pass, and its arguments."""
    return _pass_in_two_steps(attend, pass_, inputs)[1]()


def _pass_in_two_steps(attend: Attend, pass_: str, inputs: list[Inputs]) -> tuple[Callable[[], None], Finish]:
    """A function that compiles the call of one pass, and one that returns it with its arguments.

    The backward call starts from the residuals of the forward, so its time is that of the gradients alone, including
    those of a bias and of sinks. "both" computes out and the gradients of query, key and value, as a training step
    does; "jvp" computes out and its tangent.
    """
    arguments = [(*_qkv(x), _others(x)) for x in inputs]
    if pass_ == "backward":
        return _backward_in_two_steps(attend, inputs, arguments)
    call: Any = jax.jit(attend)
    if pass_ == "both":

        def both(q: Any, k: Any, v: Any, arrays: Any, dout: Any) -> Any:
            out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, arrays), q, k, v)
            return out, pull(dout)

        call = jax.jit(both)
        arguments = [(*a, x.dout) for a, x in zip(arguments, inputs, strict=True)]

    if pass_ == "jvp":

        def jvp(qkv: Any, arrays: Any, tangents: Any) -> Any:
            return jax.jvp(lambda q, k, v: attend(q, k, v, arrays), qkv, tangents)

        call, arguments = jax.jit(jvp), [(_qkv(x), _others(x), _tangents(x)) for x in inputs]

    return lambda: call.lower(*arguments[0]).compile(), lambda: (call, arguments)


def _backward_in_two_steps(
    attend: Attend, inputs: list[Inputs], arguments: list[Any]
) -> tuple[Callable[[], None], Finish]:
    @jax.jit
    def pull(q: Any, k: Any, v: Any, arrays: Any) -> Any:
        moving = {name: arrays[name] for name in DIFFERENTIATED if name in arrays}
        return jax.vjp(lambda q, k, v, x: attend(q, k, v, arrays | x), q, k, v, moving)[1]

    backward = jax.jit(lambda residuals, dout: residuals(dout))

    def compile_it() -> None:
        pull.lower(*arguments[0]).compile()
        backward.lower(jax.eval_shape(pull, *arguments[0]), inputs[0].dout).compile()

    def finish() -> tuple[Attend, list[Any]]:
        first = pull(*arguments[0]), inputs[0].dout
        copies = copies_for(first, jax.default_backend())  # residuals may be far larger than the inputs
        rest = zip(arguments[1:copies], inputs[1:copies], strict=True)
        return backward, [first, *((pull(*argument), x.dout) for argument, x in rest)]

    return compile_it, finish


def _qkv(inputs: Inputs) -> tuple[jax.Array, ...]:
    return tuple(inputs.positional[name] for name in ("query", "key", "value"))


def _tangents(inputs: Inputs) -> tuple[jax.Array, ...]:
    """The operands with their features in reverse order."""
    return tuple(x[..., ::-1] for x in _qkv(inputs))


def _others(inputs: Inputs) -> dict[str, Any]:
    return {k: v for k, v in inputs.positional.items() if k.startswith("cu_")} | inputs.keywords


def _torch_calls(attend: Attend, pass_: str, inputs: list[Inputs]) -> tuple[Attend, list[Any]]:
    """PyTorch in this process, in its own layout: [b, h, s, d], contiguous."""
    import torch

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
