"""jax_flash: exact attention for JAX as custom calls, on NVIDIA GPUs and on CPUs."""

from . import masks
from ._version import __version__
from .attention import flash_attention
from .backends import Backend, backends
from .backends import register as _register
from .check import check_inputs
from .dot_product import dot_product_attention
from .exporting import export_checks
from .flop_count import flops
from .merge import merge_attention
from .paged.append import append_kv
from .paged.attention import paged_attention
from .ring import ring_attention
from .rotary import apply_rotary
from .varlen import flash_attention_varlen
from .zigzag import zigzag_permute, zigzag_positions, zigzag_unpermute

__all__ = [
    "Backend",
    "__version__",
    "append_kv",
    "apply_rotary",
    "backends",
    "check_inputs",
    "dot_product_attention",
    "export_checks",
    "flash_attention",
    "flash_attention_varlen",
    "flops",
    "masks",
    "merge_attention",
    "paged_attention",
    "ring_attention",
    "zigzag_permute",
    "zigzag_positions",
    "zigzag_unpermute",
]

_register()  # at import, so that programs that another process exported or compiled find the custom calls
