"""Forward and backward cells of the peers' suite.

Compiling takes longer than timing here, so the programs of several cells are compiled in parallel before they are
timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax

from . import cases, flop, measure, peers
from .bars import Cell
from .cases import Case, gpu_case

WAVE = 6  # cells whose programs are compiled in parallel; their inputs and residuals are in memory together
RUN = ("cudnn", "flash-attn3-jax", "dew-flash-attn", "jla")  # installed without trouble, and known to run
OTHERS = ("cudnn", "fa4-jax", "tokamax", "pallas")  # these compile slowly, so they come last
PASSES = ("backward", "forward")
PLOTTED = (
    *(gpu_case(d, s, causal) for d in (128, 64) for s in (4096, 16384) for causal in (True, False)),
    cases.GQA[0],
    gpu_case(256, 4096, True),
)
SMALL_CHAIN = 16

Request = tuple[str, Case, str]  # implementation, case, pass


@dataclass(frozen=True)
class Wanted:
    """A cell before it is measured: its calls by name, and its tags."""

    calls: dict[str, Request]
    tags: Cell = field(default_factory=dict)


def timed(calls: measure.Calls, settle: float | None = None) -> dict[str, Any]:
    return measure.in_turns(calls, settle=settle)


def measured(wanted: Iterable[Wanted], settle: float | None = measure.SETTLED) -> Iterator[Cell]:
    """The cells, compiled in waves. A call that fails, of this library too, is a note in its cell.

    `settle`: seconds of untimed calls before each burst; None: as many calls as are timed, as for the figures that
    the bars against peers come from.
    """
    waiting = list(wanted)
    while waiting:
        wave, waiting = waiting[:WAVE], waiting[WAVE:]
        requests = {request: request for cell in wave for request in cell.calls.values()}
        calls, refused = peers.prepare(requests, raise_own=False)
        for number, cell in enumerate(wave):
            there = {name: calls[request] for name, request in cell.calls.items() if request in calls}
            notes = {name: refused[request] for name, request in cell.calls.items() if request in refused}
            yield cell.tags | {"times": timed(there, settle) | notes}
            later = {request for other in wave[number + 1 :] for request in other.calls.values()}
            for request in [request for request in calls if request not in later]:
                del calls[request]


def against_peers(
    chosen: Iterable[Case],
    pass_: str,
    of: str,
    names: tuple[str, ...] = RUN,
    product: bool = False,
    settle: float | None = None,
) -> Iterator[Cell]:
    """Cells of kind "peer": this library and its peers. With `product` the matrix product is timed right after them.
    `settle` has the meaning that it has in measured()."""
    wanted = []
    for case in chosen:
        tags = {"case": case.name, "pass": pass_, "d": case.d, "s": case.sq, "causal": case.causal, "of": of}
        tags |= {"kind": "peer", "name": f"{case.name} {pass_}", "flop": flop.attention(case, pass_)}
        every = ("jax_flash", *names)
        if case.layout == "varlen":
            every = ("jax_flash", "segment ids", *names)
        wanted.append(Wanted({name: (name, case, pass_) for name in every}, tags))
    for cell in measured(wanted, settle):
        if product:
            cell["product"] = flop.matmul("gpu")
            cell["times"] |= timed({"matmul": measure.matmul_call("gpu", "bfloat16")}, settle)
        yield cell


def matrix(pass_: str, settle: float | None = None) -> Iterator[Cell]:
    """The 18 shapes and the heads of models, with head dim 128 and the models first."""
    first = [case for case in cases.MATRIX if case.d == 128]
    rest = [case for case in cases.MATRIX if case.d != 128]
    yield from against_peers((*first, *cases.GQA, *rest), pass_, "matrix", settle=settle)


def settled(pass_: str) -> Iterator[Cell]:
    """The cells of `matrix` at settled power, which have no bars."""
    for cell in matrix(pass_, measure.SETTLED):
        yield cell | {"kind": "settled"}


def latent(pass_: str) -> Iterator[Cell]:
    """DeepSeek-V3's heads, which cuDNN does not take, and the matrix product."""
    yield from against_peers((cases.MLA,), pass_, "models", ("jla",), product=True)


def float32(pass_: str) -> Iterator[Cell]:
    """Beside XLA, whose products jax.default_matmul_precision chooses: one TF32 product, unless it is "highest"."""
    yield from against_peers(cases.FLOAT32, pass_, "float32", ("xla",))


def between_64_and_96(pass_: str) -> Iterator[Cell]:
    yield from against_peers(cases.BETWEEN_64_AND_96, pass_, "head dims 72 to 96", ("cudnn", "fa4-jax"))


def biased(pass_: str) -> Iterator[Cell]:
    yield from against_peers(cases.BIASED, pass_, "bias and mask", ("cudnn", "xla"))


def windows(pass_: str) -> Iterator[Cell]:
    yield from against_peers(cases.WINDOWS, pass_, "windows")


def documents(pass_: str) -> Iterator[Cell]:
    """Packed documents, as varlen and by segment ids, compared with fixed sequences of 4,096 tokens."""
    packed = [cases.gpu_documents(d, causal=True) for d in cases.HEAD_DIMS]
    fixed = [gpu_case(case.d, 4096, causal=True) for case in packed]
    wanted = []
    for case, plain in zip(packed, fixed, strict=True):
        calls = {
            name: (name, case, pass_)
            for name in ("jax_flash", "segment ids", "flash-attn3-jax", "dew-flash-attn", "jla")
        }
        work = {"fixed": flop.attention(plain, pass_), "packed": flop.attention(case, pass_)}
        tags = {"kind": "documents", "name": f"{case.name} {pass_}", "pass": pass_, "d": case.d, "work": work}
        calls["fixed"] = ("jax_flash", plain, pass_)
        wanted.append(Wanted(calls, tags | {"flop": work["packed"]}))
    yield from measured(wanted)


def options(d: int, pass_: str, chosen: tuple[str, ...] = ()) -> Iterator[Cell]:
    """The plain call, the deterministic backward, and each option, at s 4096 without a mask."""
    plain = gpu_case(d, 4096)
    there = cases.gpu_options(d)
    calls = {"plain": ("jax_flash", plain, pass_)}
    if pass_ == "backward":
        calls["deterministic"] = ("deterministic", plain, pass_)
    names = chosen or tuple(name for name in there if name != "bias of each head")
    calls |= {name: ("jax_flash", there[name], pass_) for name in names}
    tags = {"kind": "options", "name": f"d{d} s4096 options {pass_}", "d": d, "pass": pass_}
    yield from measured([Wanted(calls, tags)])


def deterministic() -> Iterator[Cell]:
    """The plain and the deterministic backward of long and causal calls."""
    wanted = []
    for case in (gpu_case(d, s, True) for d in cases.HEAD_DIMS for s in (4096, 16384)):
        calls = {
            name: (peer, case, "backward") for name, peer in (("plain", "jax_flash"), ("deterministic",) * 2)
        }
        tags = {
            "kind": "options",
            "name": f"{case.name} deterministic backward",
            "d": case.d,
            "pass": "backward",
        }
        wanted.append(Wanted(calls, tags))
    yield from measured(wanted)


def pairs(pass_: str) -> Iterator[Cell]:
    """Pairs of a plain call and another shape: grouped heads, a window, and lengths that are no multiple of a tile."""
    wanted = []
    for d in (64, 128):
        plain, long = gpu_case(d, 4096), gpu_case(d, 16384, causal=True)
        of_group = max(1, plain.hq // 8)
        two = [("GQA 8:1", plain, plain.replace(name=f"{plain.name} hk{of_group}", hk=of_group))]
        two.append(("window 1024", long, long.replace(name=f"{long.name} window", window=(1023, 0))))
        for s, ragged in ((4096, 4001), (1024, 1000), (768, 777)):
            whole = gpu_case(d, s, b=cases.TOKENS // s)
            two.append((f"s {ragged}", whole, whole.replace(name=f"d{d} s{ragged}", sq=ragged, sk=ragged)))
        for what, one, this in two:
            work = {name: flop.attention(case, pass_) for name, case in (("plain", one), ("this", this))}
            tags = {"kind": "ratio", "what": what, "d": d, "pass": pass_, "name": f"{this.name} {pass_}"}
            calls = {"plain": ("jax_flash", one, pass_), "this": ("jax_flash", this, pass_)}
            wanted.append(Wanted(calls, tags | {"flop": work}))
    yield from measured(wanted)


# --- one short sequence -----------------------------------------------------------------------------------------------


def small(pass_: str) -> Iterator[Cell]:
    """One sequence of 512 or 1,024 tokens: the device's time, in a program of several calls, and the time of calls
    one by one, which includes the host's."""
    sizes = [cases.small_case(*size) for size in cases.SMALL]
    names = ("jax_flash", "cudnn", "flash-attn3-jax", "dew-flash-attn")
    requests = {(case, name): (name, case, pass_) for case in sizes for name in names}
    calls, refused = peers.prepare(requests, raise_own=False)
    chains, failed = peers.compiled_side_by_side(
        {key: functools.partial(in_one_program, pass_, *call) for key, call in calls.items()}
    )
    for case in sizes:
        tags = {"kind": "small", "d": case.d, "s": case.sq, "causal": case.causal, "pass": pass_}
        for how, found, notes, count in (
            ("one by one", calls, refused, 1),
            ("device", chains, refused | failed, SMALL_CHAIN),
        ):
            there = {name: found[case, name] for name in names if (case, name) in found}
            times = measure.of_one(timed(there), count)
            times |= {name: notes[case, name] for name in names if (case, name) in notes}
            yield tags | {"name": f"{case.name} {pass_}, {how}", "times": times}


def in_one_program(pass_: str, call: Callable[..., Any], arguments: list[Any]) -> peers.Finish:
    """SMALL_CHAIN calls in one program. Each call's input is the result of the one before: out becomes the next query,
    dq the next cotangent. All gradients are results, so that XLA removes none of them."""
    first = arguments[0]

    @jax.jit
    def chain(*given: Any) -> Any:
        others = []
        for _ in range(SMALL_CHAIN):
            fed, *rest = jax.tree.leaves(call(*given))
            others.append(rest)
            given = (fed, *given[1:]) if pass_ == "forward" else (*given[:-1], fed)
        return fed, others

    chain.lower(*first).compile()
    return lambda: (chain, [first])


# --- peers that are slow to compile -----------------------------------------------------------------------------------


def other_peers() -> Iterator[Cell]:
    """fa4-jax, tokamax and Pallas in the cells of the first page's plot."""
    for some in (PLOTTED[:8], PLOTTED[8:]):
        for pass_ in PASSES:
            yield from against_peers(some, pass_, "others", OTHERS)


def fa4_jax(pass_: str) -> Iterator[Cell]:
    """fa4-jax in the windows and in the cells of `matrix` that `other_peers` does not have."""
    rest = [case for case in (*cases.MATRIX, *cases.GQA, *cases.WINDOWS) if case not in PLOTTED]
    yield from against_peers(rest, pass_, "others", ("cudnn", "fa4-jax"))


SECTIONS: dict[str, Callable[[], Iterator[Cell]]] = {
    "backward": functools.partial(matrix, "backward"),
    "latent": lambda: (cell for pass_ in PASSES for cell in latent(pass_)),
    "windows": lambda: (cell for pass_ in PASSES for cell in windows(pass_)),
    "documents": lambda: (cell for pass_ in PASSES for cell in documents(pass_)),
    "options": lambda: (cell for d in (128, 64) for cell in options(d, "backward")),
    "options d256": lambda: options(256, "backward"),
    "deterministic": deterministic,
    "options forward": lambda: (cell for d in cases.HEAD_DIMS for cell in options(d, "forward")),
    "pairs": lambda: (cell for pass_ in PASSES for cell in pairs(pass_)),
    "float32": lambda: (cell for pass_ in PASSES for cell in float32(pass_)),
    "bias and mask": lambda: (cell for pass_ in PASSES for cell in biased(pass_)),
    "head dims": lambda: (cell for pass_ in PASSES for cell in between_64_and_96(pass_)),
    "short": functools.partial(small, "backward"),
    "short forward": functools.partial(small, "forward"),
    "forward": functools.partial(matrix, "forward"),
    "other peers": other_peers,
    "fa4-jax": lambda: (cell for pass_ in PASSES for cell in fa4_jax(pass_)),
    "settled backward": functools.partial(settled, "backward"),
    "settled forward": functools.partial(settled, "forward"),
}
