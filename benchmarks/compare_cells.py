"""The cells of a comparison of two checkouts: their calls and arrays.

A cell is prepared for the package of each checkout in turn, and both get the same arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from . import adapters, cases, decode_calls, measure, peers, suite_cpu
from .cases import Case, gpu_case

Prepared = tuple[measure.Call, list[Any]]  # a compiled function, and the argument tuples that it goes through


@dataclass(frozen=True)
class Cell:
    """`prepare(package)` gives the call and its arguments.

    Attributes:
      calls: how many calls one call of the prepared function makes.
      repeatable: results are promised to have the same bits in every run.
    """

    name: str
    prepare: Callable[[ModuleType], Prepared]
    calls: int = 1
    repeatable: bool = True


def of_platform(platform: str) -> list[Cell]:
    return list(_gpu() if platform == "gpu" else _cpu())


# Inputs of one case only, because they may fill gigabytes.
_inputs = functools.lru_cache(maxsize=1)(peers.draw_inputs)


def _attention(
    case: Case, pass_: str, what: str = "", mask: Callable[[ModuleType], Any] | None = None, **options: Any
) -> Cell:
    """A cell of a public call; `what` names the mask that `mask` makes. On a GPU a backward's bits are repeatable only
    with deterministic=True."""

    def prepare(package: ModuleType) -> Prepared:
        given = options | ({"mask": mask(package)} if mask else {})
        return peers.pass_calls(adapters.ours(case, package, **given), pass_, _inputs(case))

    repeatable = pass_ == "forward" or jax.default_backend() == "cpu" or "deterministic" in options
    words = [case.name, *([what] if what else []), pass_, *options]
    return Cell(" ".join(words), prepare, repeatable=repeatable)


# --- GPU ------------------------------------------------------------------------------------------------------------

MASKED = 8192  # tokens of a sequence under a mask
SMALL_CHAIN = 30  # small calls in one program
EVERY_KIND = (64, 32, 8, 128, 8192)  # the shape at which the rarer kinds of decode are timed
PAGES_OF_ONE = (EVERY_KIND, (24, 24, 24, 128, 8192), (64, 8, 1, 256, 8192))


def _gpu() -> Iterator[Cell]:
    yield from _gpu_forward()
    yield from _gpu_decode()
    for heads in ((32, 64), (16, 128), (8, 256)):
        yield from _gpu_prefill(*heads)
    for size in cases.SMALL:
        yield _small(cases.small_case(*size))
    yield from _gpu_backward()
    yield from _gpu_masks()


def _gpu_forward() -> Iterator[Cell]:
    documents = [cases.gpu_documents(d, True) for d in cases.HEAD_DIMS] + [cases.gpu_documents(128, False)]
    options = [case for d in (64, 128) for case in cases.gpu_options(d).values()]
    for case in (*cases.MATRIX, *cases.GQA, cases.MLA, *cases.WINDOWS, *documents, *options, *_other_rows()):
        yield _attention(case, "forward")


def _other_rows() -> Iterator[Case]:
    """Head dims and dtypes that are not in the matrix of shapes."""
    for d in (32, 96, 192):
        yield gpu_case(d, 4096, causal=True, hq=16, hk=16)
    for dtype in ("float16", "float32"):
        yield gpu_case(128, 4096, causal=True, dtype=dtype).replace(name=f"d128 s4096 causal {dtype}")


def _gpu_decode() -> Iterator[Cell]:
    for shape in cases.DECODE:
        name = cases.decode_name(shape)
        yield _decode(f"{name} contiguous", functools.partial(decode_calls.contiguous, shape=shape))
        for size in (16, 64, 1) if shape in PAGES_OF_ONE else (16, 64):
            yield _decode(
                f"{name} pages of {size}", functools.partial(decode_calls.paged, shape=shape, size=size)
            )
    name = cases.decode_name(EVERY_KIND)
    kinds: dict[str, Callable[..., decode_calls.Call]] = {
        "packed": decode_calls.packed,
        "ragged": lambda package, shape: decode_calls.ragged(package, shape)[0],
        "float8": decode_calls.float8,
        "4 queries": decode_calls.several_queries,
        "batch invariant": functools.partial(decode_calls.paged, size=64, batch_invariant=True),
    }
    for kind, make in kinds.items():
        yield _decode(f"{name} {kind}", functools.partial(make, shape=EVERY_KIND))
    for heads, columns in ((16, 576), (64, 576), (128, 576), (64, 512)):
        make_latent = functools.partial(decode_calls.latent, heads=heads, columns=columns)
        yield _decode(f"decode latent {heads} heads of {columns}", make_latent)


def _decode(name: str, make: Callable[[ModuleType], decode_calls.Call]) -> Cell:
    return Cell(name, lambda package: decode_calls.chained(make(package)), calls=decode_calls.CHAIN)


def _gpu_prefill(h: int, d: int) -> Iterator[Cell]:
    sizes = {"b": 2, "sq": 4096, "sk": 4096, "hq": h, "hk": h, "d": d, "dv": d}
    case = Case(f"prefill b2 s4096 h{h} d{d} causal", causal=True, dtype="bfloat16", **sizes)
    for size in (16, 64):
        prepare = functools.partial(decode_calls.prefill, case=case, size=size)
        yield Cell(f"{case.name} pages of {size}", prepare)


def _small(case: Case) -> Cell:
    """Calls of microseconds, many in one program."""

    def prepare(package: ModuleType) -> Prepared:
        attend = adapters.ours(case, package)
        return measure.chained(lambda *qkv: attend(*qkv, {}), SMALL_CHAIN), [_qkv(_inputs(case)[0])]

    return Cell(f"small {case.name}", prepare, calls=SMALL_CHAIN)


def _qkv(inputs: cases.Inputs) -> tuple[jax.Array, ...]:
    return tuple(inputs.positional[name] for name in ("query", "key", "value"))


def _gpu_backward() -> Iterator[Cell]:
    for d in cases.HEAD_DIMS:
        for causal in (False, True):
            yield _attention(gpu_case(d, 4096, causal), "backward")
            yield _attention(gpu_case(d, 4096, causal), "backward", deterministic=True)
    options = cases.gpu_options(128, causal=True)
    rows = [case for case in _other_rows() if case.dtype == "bfloat16"]
    others = [cases.GQA[1], cases.WINDOWS[2], cases.gpu_documents(128, True), *rows]
    for case in (*others, *(options[x] for x in ("bias", "alibi", "softcap", "dropout", "segments"))):
        yield _attention(case, "backward", deterministic=True)
    for option in ("bias", "dropout"):  # these have loops of their own
        yield _attention(cases.gpu_options(64)[option], "backward")


def _causal_ranges(package: ModuleType) -> Any:
    row = jnp.arange(MASKED, dtype=jnp.int32)[None, None]
    return package.masks.ranges(jnp.zeros_like(row), row + 1)


def _first_and_window(package: ModuleType) -> Any:
    return package.masks.first_and_window(64, 1024)


def _gpu_masks() -> Iterator[Cell]:
    """Masks of ranges, with and without a gap between them, in each layout."""
    for d in cases.HEAD_DIMS:
        case = gpu_case(d, MASKED)
        for pass_ in ("forward", "backward"):
            yield _attention(case, pass_, "causal as ranges", _causal_ranges)
            yield _attention(case, pass_, "first and window", _first_and_window)
    for d in (64, 128):
        capped = gpu_case(d, MASKED).replace(name=f"d{d} s{MASKED} softcap", softcap=20.0)
        yield _attention(capped, "forward", "first and window", _first_and_window)
    for pass_ in ("forward", "backward"):
        yield _attention(cases.gpu_documents(128, False), pass_, "first and window", _first_and_window)
    case = Case("prefill", b=1, sq=MASKED, sk=MASKED, hq=16, hk=16, d=128, dv=128, dtype="bfloat16")

    def prefill(package: ModuleType) -> Prepared:
        return decode_calls.prefill(package, case, 64, mask=_first_and_window(package))

    yield Cell("prefill first and window d128 pages of 64", prefill)


# --- CPU ------------------------------------------------------------------------------------------------------------


def _cpu() -> Iterator[Cell]:
    for dtype in cases.CPU_DTYPES:
        for pass_ in suite_cpu.PASSES:
            yield _attention(cases.cpu_small(dtype), pass_)
            for shape in cases.CPU_SHAPES:
                for causal in (False, True):
                    case = cases.cpu_case(shape, dtype, causal=causal)
                    yield _attention(case.replace(name=f"{case.name}{' causal' if causal else ''}"), pass_)
            pairs = cases.cpu_pairs(dtype) | cases.cpu_options(dtype)
            for what, (_, case) in pairs.items():
                yield _attention(case.replace(name=f"{what} {dtype}"), pass_)
    for dtype in cases.CPU_DECODE_DTYPES:
        for layout in ("contiguous", "paged"):
            yield _cpu_decode(dtype, layout)


def _cpu_decode(dtype: str, layout: str) -> Cell:
    def prepare(package: ModuleType) -> Prepared:
        return suite_cpu.decode_call(package, dtype), [suite_cpu.decode_arguments(dtype, layout)]

    return Cell(f"{cases.decode_name(cases.CPU_DECODE)} {dtype} {layout}", prepare)
