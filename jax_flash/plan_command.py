"""`python -m jax_flash plan`: which CUDA kernel a call of some shape runs, its tiles, grid and workspace."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from .backends import DTYPES, compute_capability, extension, local_devices
from .operands import operand_bits, padded_head_dim
from .spec import UNLIMITED

# What one block may use, in bytes, by compute capability (CUDA C++ programming guide, table of technical
# specifications).
SHARED_MEMORY = {75: 65_536, 80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448}
SHARED_MEMORY |= {100: 232_448, 103: 232_448, 110: 232_448, 120: 101_376, 121: 101_376}


@dataclass(frozen=True)
class Gpu:
    """What a plan depends on; `shared_memory` in bytes of one block."""

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
# Each is an option of the command. A bias is [batch, heads, seqlen, kv-seqlen], of the call's dtype.
OPERANDS = ("bias", "mask", "alibi_slopes", "sinks", "q_segment_ids", "kv_lengths")
PASSES = ("forward", "backward", "bias_gradient")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--gpu", choices=sorted(KNOWN), help="plan for this GPU (default: the one found, else h200)")
    add("--dtype", choices=DTYPES, default="bfloat16")
    add("--batch", type=int, default=1, help="batch entries, or sequences with --varlen")
    add("--seqlen", type=int, required=True, help="queries of a batch entry, or all tokens with --varlen")
    add("--kv-seqlen", type=int, help="keys (default: as many as queries)")
    add("--heads", type=int, required=True)
    add("--kv-heads", type=int, help="(default: as many as query heads)")
    add("--head-dim", type=int, required=True, metavar="D")
    add("--value-dim", type=int, metavar="DV", help="(default: D)")
    add("--varlen", action="store_true", help="packed sequences")
    add("--causal", action="store_true")
    add(
        "--window",
        type=int,
        nargs=2,
        metavar=("LEFT", "RIGHT"),
        help="keys seen beside the diagonal, -1: all",
    )
    add("--softcap", type=float, default=0.0)
    add("--dropout", action="store_true")
    add("--deterministic", action="store_true")
    for name in OPERANDS:
        add(
            "--" + name.replace("_", "-"),
            action="store_true",
            help="the call has this operand, nothing of it broadcast",
        )


def run(options: argparse.Namespace) -> int:
    """Prints a line per pass; 1 where a pass has no kernel."""
    core, problem = extension()
    if core is None:
        print(f"the plan is made by the extension, which is {problem}")
        return 1
    gpu = KNOWN[options.gpu] if options.gpu else found_gpu() or KNOWN["h200"]
    print(
        f"{gpu.name}: sm_{gpu.capability}, {gpu.sm_count} multiprocessors, {gpu.shared_memory} bytes shared"
    )
    failed = False
    for pass_ in PASSES if options.bias else PASSES[:2]:
        try:
            chosen = core.plan(pass_=pass_, **call(options, gpu, pass_))
        except RuntimeError as error:
            failed = True
            print(f"{pass_}: {error}")
            continue
        built = "" if options.dtype in chosen["row"]["built"] else "; not in the library installed here"
        print(f"{chosen['text']} (of at most {chosen['workspace_bound']}){built}")
    return int(failed)


def call(options: argparse.Namespace, gpu: Gpu, pass_: str) -> dict[str, Any]:
    """The keyword arguments of `_core.plan`."""
    present = [name for name in OPERANDS if getattr(options, name)]
    present += ["kv_segment_ids"] if options.q_segment_ids else []
    present += ["dropout"] if options.dropout else []
    k_rows = options.kv_seqlen or options.seqlen
    shapes = dict(
        batch=options.batch,
        q_rows=options.seqlen,
        k_rows=k_rows,
        heads=options.heads,
        kv_heads=options.kv_heads or options.heads,
        d=padded_head_dim(options.head_dim),
        dv=padded_head_dim(options.value_dim or options.head_dim),
    )
    if pass_ == "bias_gradient":
        shapes["bias"] = (options.batch, options.heads, options.seqlen, k_rows)
    elif options.bias:  # as plan.cc's bias_in_tiles has it
        shapes["bias_in_tiles"] = k_rows % 8 == 0 and options.dtype != "float32"
    left, right = options.window or (UNLIMITED, UNLIMITED)
    band = dict(left=left, right=0 if options.causal else right)
    device = dict(capability=gpu.capability, sm_count=gpu.sm_count, shared_memory=gpu.shared_memory)
    scores = dict(softcap=options.softcap, deterministic=options.deterministic, varlen=options.varlen)
    return dict(
        dtype=options.dtype, operands=operand_bits(tuple(present)), **shapes, **device, **scores, **band
    )


def found_gpu() -> Gpu | None:
    """This process's first GPU."""
    for device in local_devices("cuda"):
        capability = compute_capability(device)
        if capability in SHARED_MEMORY:
            return Gpu(device.device_kind, capability, int(device.core_count))
    return None
