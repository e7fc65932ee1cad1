"""The functions of other libraries, with their names and arguments, for code that is ported from them."""

from . import flash_attn

__all__ = ["flash_attn"]
