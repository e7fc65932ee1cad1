"""The Hopper suite: what the sm_90a forward promises about speed: the CUDA suite's sections, judged by other bars.

python -m benchmarks --suite hopper                                      # all sections
python -m benchmarks --suite hopper --sections "forward d64,small"       # these, into the report that is there
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

from . import bars_cuda, bars_hopper, cases, decode_cuda, small_cuda, suite_cuda
from .bars import Cell
from .sections import Suite

SUSTAINED = 1.0  # seconds of each, in turns


def sustained_cells() -> Iterator[Cell]:
    for d, causal in bars_hopper.OF_MATMUL:
        case = cases.gpu_case(d, bars_hopper.LONG, causal)
        yield suite_cuda.sustained_cell("forward", case, SUSTAINED, ("cudnn",))


def page_cells() -> Iterator[Cell]:
    for d in cases.HEAD_DIMS:
        heads = cases.WIDTH // d
        for causal in (False, True):
            yield decode_cuda.prefill_cell((heads, heads), d, causal, b=4)


SECTIONS: dict[str, Callable[[], Iterator[Cell]]] = {
    **{f"forward d{d}": functools.partial(suite_cuda.matrix_cells, "forward", d) for d in cases.HEAD_DIMS},
    "sustained": sustained_cells,
    **{f"options d{d}": functools.partial(suite_cuda.option_cells, d) for d in cases.HEAD_DIMS},
    "packed": functools.partial(suite_cuda.packed_cells, ("forward",)),
    **{f"shapes d{d}": functools.partial(suite_cuda.shape_cells, d) for d in (64, 128)},
    "pages": page_cells,
    "small": small_cuda.small_cells,
    "host": small_cuda.host_cells,
}

SUITE = Suite(
    "hopper",
    "gpu",
    SECTIONS,
    bars_hopper.judge,
    suite_cuda.verdict,
    suite_cuda.rates,
    bars_cuda.peer_tables,
    {"matrix": suite_cuda.SUITE.figures["matrix"]},
)
