"""Other libraries' names and arguments, for code that comes from them."""

from . import flash_attn

__all__ = ["flash_attn"]
