"""Writes the wrappers of wgmma, one for each N: an instruction names each of its N / 2 registers.

wgmma.py FILE

csrc/cuda/ptx/wgmma.cuh includes the file, and says what they mean.
"""

from __future__ import annotations

import sys
from pathlib import Path

SIZES = (16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 256)
TYPES = {"__half": "f16", "__nv_bfloat16": "bf16"}


def instruction(n: int, type_: str, a: list[tuple[str, str]], transposed: list[str], first: bool) -> str:
    """The asm statement. `a`: the operands after the accumulator, (constraint, expression) each; B's is the last."""
    count = n // 2
    numbers = [f"%{count + i}" for i in range(len(a) + len(transposed))]
    left, right = numbers[: len(a) - 1], numbers[len(a) - 1]
    d = ", ".join(f"%{i}" for i in range(count))
    left_text = left[0] if len(left) == 1 else "{" + ", ".join(left) + "}"
    tail = ", ".join(["on", "1", "1", *numbers[len(a) :]])
    mode = "=f" if first else "+f"
    outputs = ", ".join(f'"{mode}"(d[{i // 4}][{i % 4}])' for i in range(count))
    inputs = ", ".join([f'"{c}"({x})' for c, x in a] + [f'"n"({x})' for x in transposed])
    name = f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{type_}.{type_}"
    return (
        f'asm volatile("{{.reg .pred on; setp.ne.b32 on, {int(not first)}, 0; '
        f'{name} {{{d}}}, {left_text}, {right}, {tail};}}" : {outputs} : {inputs});'
    )


def function(n: int, c_type: str, shared: bool) -> str:
    if shared:
        template, argument = "bool kFirst, int kTransposeA = 0, int kTransposeB = 0", "uint64_t a"
        operands, transposed = [("l", "a"), ("l", "b")], ["kTransposeA", "kTransposeB"]
    else:
        template, argument = "bool kFirst, int kTransposeB = 0", "const uint32_t (&a)[4]"
        operands, transposed = [("r", f"a[{i}]") for i in range(4)] + [("l", "b")], ["kTransposeB"]
    first, others = (instruction(n, TYPES[c_type], operands, transposed, x) for x in (True, False))
    return (
        f"  template <{template}>\n"
        f"  static __device__ __forceinline__ void multiply(float (&d)[{n // 8}][4], {argument}, uint64_t b) {{\n"
        f"    if constexpr (kFirst) {{\n      {first}\n    }} else {{\n      {others}\n    }}\n  }}\n"
    )


def main(path: Path) -> None:
    structs = [
        f"template <>\nstruct Wgmma<{c_type}, {n}> {{\n{function(n, c_type, True)}{function(n, c_type, False)}}};\n"
        for n in SIZES
        for c_type in TYPES
    ]
    text = "// Written by cmake/wgmma.py.\nnamespace jax_flash::ptx {\n" + "".join(structs) + "}\n"
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
