"""flash_attn's seven functions with its arguments, in its order and with its defaults (versions 2.7 and 2.8).

The only differences are those that JAX requires, and one:

- `flash_attn_with_kvcache` cannot write to its arguments, and always returns the updated caches as its last results.
  If they are donated to a jitted step, they are updated in place.
- Dropout has no hidden generator: `dropout_p > 0` needs the extra keyword `dropout_key`.
- `return_attn_probs` returns `(out, softmax_lse, None)`, because attention weights are never stored. With dropout, for
  which flash_attn would return them, it raises.
- lse of a row without a visible key is −inf, as in `jax_flash.flash_attention`, where flash_attn has +inf.
- All functions have the extra keyword `implementation`, as in `jax_flash.flash_attention`.

They also support what flash_attn does not: float32, any page size, dv ≠ d, CPUs, and gradients through pages. Errors
about shapes and dtypes are raised by the function that does the work and use its names (`query` for q, `kv_lengths` for
cache_seqlens, …).
"""

from .attention import flash_attn_func, flash_attn_varlen_func
from .kvcache import flash_attn_with_kvcache
from .packed import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
