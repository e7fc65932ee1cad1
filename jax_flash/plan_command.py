"""Tells which CUDA kernel a call runs: its tiles, grid, shared memory and workspace. Needs no GPU."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax

from .attention import flash_attention
from .backends import compute_capability, extension, local_devices
from .batching import named_sizes
from .checker import DTYPES
from .flop_count import spec_and_shapes
from .masks import Mask
from .operands import DIMS, ELEMENTS, MAX_HEAD_DIM, whole_chunks
from .padding import bias_columns
from .paged.attention import paged_attention
from .varlen import flash_attention_varlen
from .visible import forms
from .workspace import mask_sizes

# Shared memory that one CTA may use, in bytes, by compute capability (CUDA C++ programming guide, table of technical
# specifications).
SHARED_MEMORY = {75: 65_536, 80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448}
SHARED_MEMORY |= {100: 232_448, 103: 232_448, 110: 232_448, 120: 101_376, 121: 101_376}


@dataclass(frozen=True)
class Gpu:
    """The GPU that a plan is made for. `shared_memory`: bytes that one CTA may use."""

    name: str
    capability: int
    sm_count: int

    @property
    def shared_memory(self) -> int:
        return SHARED_MEMORY[self.capability]


KNOWN = {
    "t4": Gpu("Tesla T4", 75, 40),
    "a100": Gpu("NVIDIA A100", 80, 108),
    "a10": Gpu("NVIDIA A10", 86, 72),
    "l4": Gpu("NVIDIA L4", 89, 58),
    "rtx4090": Gpu("GeForce RTX 4090", 89, 128),
    "h100": Gpu("NVIDIA H100", 90, 132),
    "h200": Gpu("NVIDIA H200", 90, 132),
    "b200": Gpu("NVIDIA B200", 100, 148),
}
# Each is an option of the command. A bias is [batch, heads, seqlen, kv-seqlen].
OPERANDS = ("bias", "mask", "alibi_slopes", "sinks", "q_segment_ids", "kv_lengths", "draft_mask")
PASSES = ("forward", "backward", "tangent", "bias_gradient")
DEFAULT_PAGE_SIZE = 64
_GATHERED = "the pages are gathered, and the dense backward runs on what was gathered"
OF_PAGES = ("page_size", "float8", "latent", "num_splits", "batch_invariant", "draft_mask")
OF_FIXED = ("bias", "mask", "q_segment_ids")
LEGEND = """
A line says, for a pass of the call:
  sm80, sm90         the generation of the kernel: portable (Ampere and newer), Hopper's own
  dense, paged       where its keys and values come from: arrays, pages of a pool; dense|paged: one kernel for both
  plain, softcap, …  the score options that it was compiled for; general: any combination of them
  d, dv              the head dims that its tiles hold; smaller ones are padded inside the tiles
  tile 128x64        queries x keys that a CTA (thread block) multiplies at a time
  query, key tiles   how many of them there are; persistent CTAs share them out, one CTA for each SM or fewer
  decode splits      (few queries) CTAs that share the keys of each column, that is of a KV head or some of its rows
  shared memory      of a CTA; workspace: global memory that XLA allocates for the call, besides operands and
                     results, and its bound for other lengths and GPUs
"""


def _size(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def _side(text: str) -> int | None:
    try:
        return None if text.lower() == "none" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor none") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--gpu", choices=sorted(KNOWN), help="plan for this GPU (default: the one found, else h200)")
    add("--dtype", choices=DTYPES, default="bfloat16")
    add("--batch", type=_size, default=1, help="batch entries; sequences with --varlen or --paged")
    add(
        "--seqlen", type=_size, required=True, help="queries of a batch entry; all query tokens with --varlen"
    )
    add("--kv-seqlen", type=_size, help="keys; of one sequence with --paged (default: as many as queries)")
    add("--heads", type=_size, required=True)
    add("--kv-heads", type=_size, help="(default: as many as query heads)")
    add("--head-dim", type=_size, required=True, metavar="D")
    add("--value-dim", type=_size, metavar="DV", help="(default: D)")
    add("--varlen", action="store_true", help="packed sequences")
    add("--paged", action="store_true", help="keys and values in pages: paged_attention, decode included")
    add("--page-size", type=_size, help=f"with --paged: tokens of a page (default: {DEFAULT_PAGE_SIZE})")
    add("--float8", action="store_true", help="with --paged: float8 page pools")
    add("--latent", action="store_true", help="with --paged: values are the first DV columns of k_pages")
    add("--num-splits", type=_size, help="with --paged")
    add("--batch-invariant", action="store_true", help="with --paged")
    add("--causal", action="store_true")
    add(
        "--window",
        type=_side,
        nargs=2,
        metavar=("LEFT", "RIGHT"),
        help="keys beside the diagonal; none: unlimited",
    )
    add("--softcap", type=float)
    add("--dropout", action="store_true")
    add("--deterministic", action="store_true")
    add("--return-max", action="store_true")
    for name in OPERANDS:
        add(
            "--" + name.replace("_", "-"),
            action="store_true",
            help="the call has this operand, none of its dimensions broadcast",
        )
    add("--bias-dtype", choices=DTYPES, help="of the bias (default: the call's)")
    add(
        "--ranges", type=int, choices=(1, 2), help="the call has a mask value of so many ranges of keys a row"
    )
    add(
        "--blocks",
        type=int,
        nargs=2,
        choices=range(16, 257, 16),
        metavar=("BQ", "BK"),
        help="the call has masks.blocks of this size",
    )


def run(options: argparse.Namespace) -> int:
    """Prints a line per pass; returns 1 where a pass has no kernel, 2 where the API refuses the call."""
    misplaced = _misplaced(options)
    if misplaced:
        print(misplaced)
        return 2
    if options.page_size is None:
        options.page_size = DEFAULT_PAGE_SIZE
    options.bias_dtype = options.bias_dtype or options.dtype
    core, problem = extension()
    if core is None:
        print(f"the plan is made by the extension, which is {problem}")
        return 1
    gpu = KNOWN[options.gpu] if options.gpu else found_gpu() or KNOWN["h200"]
    try:
        described(options, gpu, "forward")
    except (ValueError, TypeError, NotImplementedError) as error:
        print(error)
        return 2
    print(f"{gpu.name}: sm_{gpu.capability}, {gpu.sm_count} SMs, {gpu.shared_memory} bytes of shared memory")
    failed = False
    for pass_ in ("forward",) if options.paged else PASSES if options.bias else PASSES[:3]:
        try:
            chosen = core.plan(pass_=pass_, **described(options, gpu, pass_))
        except RuntimeError as error:
            failed = True
            print(f"{pass_}: {error}")
            continue
        built = "" if options.dtype in chosen["row"]["built"] else "; not in the library installed here"
        print(f"{chosen['text']} (of at most {chosen['workspace_bound']}){built}")
    if options.paged:
        has_none = options.head_dim > MAX_HEAD_DIM or (options.varlen and options.draft_mask)
        print("backward: " + ("none" if has_none else _GATHERED))
    print("plan --help explains the words")
    return int(failed)


def _misplaced(options: argparse.Namespace) -> str | None:
    """What to do about the first option that calls of this layout do not have."""
    if options.bias_dtype and not options.bias:
        return "--bias-dtype is an option of calls with a bias: add --bias"
    fixed = not (options.paged or options.varlen)
    for names, allowed, instead in (
        (OF_PAGES, options.paged, "paged calls: add --paged"),
        (OF_FIXED, fixed, "flash_attention: leave out --varlen and --paged"),
        (("dropout",), not options.paged, "calls without pages: leave out --paged"),
    ):
        for name in names:
            if not allowed and not any(getattr(options, name) is x for x in (None, False)):
                return f"--{name.replace('_', '-')} is an option of {instead}"
    return None


@dataclass(frozen=True)
class _Sizes:
    """The sizes that the options name, with the defaults filled in."""

    b: int
    sq: int
    sk: int
    hq: int
    hk: int
    d: int
    dv: int
    draft: int  # rows of a sequence's draft mask, in packed sequences of average length; 0: there is none

    @staticmethod
    def of(options: argparse.Namespace) -> _Sizes:
        def given(value: int | None, default: int) -> int:
            return default if value is None else value

        sq, hq, d = options.seqlen, options.heads, options.head_dim
        sk, hk = given(options.kv_seqlen, sq), given(options.kv_heads, hq)
        tokens = -(-sq // max(options.batch, 1)) if options.varlen else sq
        draft = tokens if options.draft_mask else 0
        return _Sizes(options.batch, sq, sk, hq, hk, d, given(options.value_dim, d), draft)


def abstract_call(options: argparse.Namespace) -> tuple[Callable[..., Any], list[Any], dict[str, Any]]:
    """The public function that the options describe, and its arguments, with shapes and dtypes for arrays."""
    n = _Sizes.of(options)
    named: dict[str, Any] = {"causal": options.causal, "softcap": options.softcap}
    named |= {"deterministic": options.deterministic, "return_max": options.return_max}
    if options.window:
        named["window"] = tuple(options.window)
    if options.dropout:
        named["dropout_rate"] = 0.1
    if options.paged:
        named |= {"num_splits": options.num_splits, "batch_invariant": options.batch_invariant}
        named["value_dim"] = n.dv if options.latent else None
    function: Callable[..., Any] = (
        paged_attention if options.paged else flash_attention_varlen if options.varlen else flash_attention
    )
    return function, _positional(options, n), named | _named(options, n)


_array: Any = jax.ShapeDtypeStruct


def _positional(options: argparse.Namespace, n: _Sizes) -> list[Any]:
    batch = () if options.varlen else (n.b,)
    starts = _array((n.b + 1,), "int32")
    query = _array((*batch, n.sq, n.hq, n.d), options.dtype)
    if options.paged:
        pages = -(-n.sk // options.page_size) if options.page_size else 0
        pool = "float8_e4m3fn" if options.float8 else options.dtype
        pools = [_array((n.b * pages, options.page_size, n.hk, width), pool) for width in (n.d, n.dv)]
        if options.latent:
            pools[1] = None
        return [query, *pools, _array((n.b, pages), "int32"), _array((n.b,), "int32")]
    keys = (_array((*batch, n.sk, n.hk, width), options.dtype) for width in (n.d, n.dv))
    return [query, *keys, *((starts, starts) if options.varlen else ())]


def _named(options: argparse.Namespace, n: _Sizes) -> dict[str, Any]:
    layouts = ("paged", "paged_varlen") if options.paged else ("fixed", "varlen")
    layout = layouts[options.varlen]
    sizes = {"b": n.b, "n": n.b, "hq": n.hq, "sq": n.sq, "tq": n.sq, "columns": n.sk}
    sizes |= {"draft_row": n.draft, "draft_column": n.draft}
    named: dict[str, Any] = {}
    for name in (name for name in OPERANDS if getattr(options, name)):
        dims = next(table[name] for table in (DIMS[layout], *DIMS.values()) if name in table)
        dtype = {"bias": options.bias_dtype, "boolean": "bool"}.get(ELEMENTS[name], ELEMENTS[name])
        named[name] = _array(tuple(sizes[dim.rstrip("*")] for dim in dims), dtype)
    if "q_segment_ids" in named:
        named["segment_ids"] = named.pop("q_segment_ids"), _array((n.b, n.sk), "int32")
    mask = _mask_value(options, n, named.get("mask"))
    named |= {"mask": mask} if mask.conditions else {}
    if options.dropout:
        named["dropout_key"] = jax.eval_shape(lambda: jax.random.key(0))
    if options.paged:
        named.pop("kv_lengths", None)  # kv_lengths is positional
        scales = ("k_scale",) if options.latent else ("k_scale", "v_scale")
        named |= {x: _array((n.hk,), "float32") for x in scales if options.float8}
        named |= {"cu_seqlens_q": _array((n.b + 1,), "int32")} if options.varlen else {}
    return named


def _mask_value(options: argparse.Namespace, n: _Sizes, array: Any) -> Mask:
    """The mask of the options, with shapes for arrays, in addition to a boolean array."""
    conditions: list[forms.Form] = []
    if options.ranges:
        limits = _array((1, n.sq) if options.varlen else (1, 1, n.sq), "int32")
        conditions.append(forms.Ranges(((limits, limits),) * options.ranges))
    if options.blocks:
        rows = -(-n.sq // options.blocks[0])
        conditions.append(forms.Blocks(_array((1, 1, rows, 1), "int32"), tuple(options.blocks)))
    if conditions and array is not None:
        conditions.append(forms.Dense(array))
    return Mask(tuple(conditions))


def described(options: argparse.Namespace, gpu: Gpu, pass_: str) -> dict[str, Any]:
    """The keyword arguments of `_core.plan`, from the spec and the shapes that the call has."""
    function, positional, named = abstract_call(options)
    spec, shapes = spec_and_shapes(function, *positional, **named)
    sizes = named_sizes(spec, shapes)
    columns = ("d", "dv", "pool_columns")
    sizes |= {name: whole_chunks(sizes[name]) for name in columns if name in sizes}
    if spec.value_dim:
        spec = replace(spec, value_dim=whole_chunks(spec.value_dim))
    arguments: dict[str, Any] = dict(
        spec=spec.plain_attributes(),
        sizes=sizes,
        dtype=options.dtype,
        float8=options.float8,
        capability=gpu.capability,
        sm_count=gpu.sm_count,
        shared_memory=gpu.shared_memory,
    )
    if pass_ == "bias_gradient":
        arguments["bias"] = shapes["bias"]
    arguments["mask"] = mask_sizes(shapes, 0, 1)
    # The rules of plan.cc, for contiguous arrays.
    half = options.dtype != "float32"
    arguments["float_bias"] = half and "bias" in shapes and options.bias_dtype == "float32"
    for name, wanted, whole in (
        ("bias", "bias_in_tiles", half and options.bias_dtype in (options.dtype, "float32")),
        ("mask", "mask_in_chunks", True),
    ):
        keys = shapes[name][-1] if name in shapes else 1
        padded = bias_columns(keys, [gpu.capability]) if name == "bias" else keys
        arguments[wanted] = whole and padded % 8 == 0
    return arguments


def found_gpu() -> Gpu | None:
    """This process's first GPU."""
    for device in local_devices("cuda"):
        capability = compute_capability(device)
        if capability in SHARED_MEMORY:
            return Gpu(device.device_kind, capability, int(device.core_count))
    return None
