"""Shapes of the tables that two other projects publish, and the ratios that those tables hold."""

from __future__ import annotations

from collections.abc import Iterator

from .bars import Cell, ran
from .cases import Case

# flash_attn's time over mini-flash-attention's on an RTX 5070: github.com/w4096/mini-flash-attention, README.md, at
# fcaa610; by the length of a sequence.
PREFILL = {256: 1.173, 512: 1.080, 1024: 1.022, 2048: 0.997, 4096: 0.989}
DECODE = {512: 1.383, 1024: 1.334, 2048: 1.307, 4096: 1.330, 8192: 1.285}
DECODE_SHAPE = (24, 24, 24, 128)  # batch, query heads, KV heads, head dim
FLASH_ATTENTION_2 = 338  # TFLOP/s on an H200, forward, d 128: the middle of what was measured, 330 to 345


def cases() -> Iterator[Case]:
    for s in PREFILL:
        sizes = {"b": 48, "sq": s, "sk": s, "hq": 24, "hk": 24, "d": 128, "dv": 128, "dtype": "float16"}
        yield Case(f"b48 h24 d128 s{s} float16", **sizes)
    for dtype in ("float16", "bfloat16"):
        for causal in (False, True):
            for s in (512, 1024, 2048, 4096, 8192):
                name = f"b2 h32 d128 s{s} {dtype}{' causal' if causal else ''}"
                sizes = {"b": 2, "sq": s, "sk": s, "hq": 32, "hk": 32, "d": 128, "dv": 128, "dtype": dtype}
                yield Case(name, causal=causal, **sizes)


def published(cell: Cell) -> float | None:
    """The published ratio at the shape of a cell; None where no table has it."""
    if (
        cell["kind"] == "decode"
        and "contiguous" in cell["times"]
        and tuple(cell["shape"][:4]) == DECODE_SHAPE
    ):
        return DECODE.get(cell["keys"]) if cell["dtype"] != "float32" else None
    return (
        PREFILL.get(cell["s"]) if cell.get("of") == "published" and cell["name"].startswith("b48") else None
    )


def table(cells: list[Cell]) -> list[str]:
    """This library beside the published ratios, at the shapes that were run."""
    rows = []
    for cell in cells:
        theirs = published(cell)
        if cell.get("of") != "published" and theirs is None:
            continue
        ours = cell["times"]["jax_flash" if cell["kind"] == "peer" else "contiguous"]["median"]
        cudnn = cell["times"]["cudnn"]["median"] if ran(cell, "cudnn") else None
        if cell["kind"] == "peer":
            rate = cell["flop"] / ours / 1e12
            shown, second = f"{rate:.0f} TFLOP/s", f"{rate / FLASH_ATTENTION_2:.2f}"
        else:
            shown, second = f"{cell['bytes_read']['contiguous'] / ours / 1e9:.0f} GB/s", "–"
        over = f"{cudnn / ours:.2f}" if cudnn else "–"
        rows.append(f"| {cell['name']} | {shown} | {over} | {second} | {theirs or '–'} |")
    if not rows:
        return []
    return [
        "## Tables of other projects",
        "",
        "| shape | this | × cuDNN | × FlashAttention-2 at its best | mini-flash-attention × flash_attn, RTX 5070 |",
        "|---|---|---|---|---|",
        *rows,
        "",
        f"FlashAttention-2: {FLASH_ATTENTION_2} TFLOP/s, long sequences; flash_attn was not in this run.",
        "",
    ]
