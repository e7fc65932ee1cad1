"""The functions of other libraries, with their names and arguments, for code that is ported from them."""

from . import (
    easydel,
    flash_attn,
    gemma,
    levanter,
    maxtext,
    pallas_gpu,
    ragged_paged_attention,
    splash,
    tokamax,
    tunix,
)

__all__ = [
    "easydel",
    "flash_attn",
    "gemma",
    "levanter",
    "maxtext",
    "pallas_gpu",
    "ragged_paged_attention",
    "splash",
    "tokamax",
    "tunix",
]
