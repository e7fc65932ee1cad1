"""The functions of other libraries, with their names and arguments, for code that is ported from them."""

from . import (
    easydel,
    equinox,
    flash_attn,
    gemma,
    keras,
    levanter,
    maxdiffusion,
    maxtext,
    pallas_gpu,
    pallas_tpu,
    ragged_paged_attention,
    sglang_jax,
    splash,
    tokamax,
    tunix,
)

__all__ = [
    "easydel",
    "equinox",
    "flash_attn",
    "gemma",
    "keras",
    "levanter",
    "maxdiffusion",
    "maxtext",
    "pallas_gpu",
    "pallas_tpu",
    "ragged_paged_attention",
    "sglang_jax",
    "splash",
    "tokamax",
    "tunix",
]
