"""Every private JAX name that this library imports, with the reason for it."""

from __future__ import annotations

import jax

from ._version import __version__

try:
    # Compares symbolic dimensions without raising.
    from jax._src.core import definitely_equal

    # Maps the names of partitioners in programs to the functions that XLA's partitioner calls.
    from jax._src.custom_partitioning import _sharding_callbacks as sharding_callbacks

    # For programs of several processes: primitives whose lowering reads the device assignment.
    from jax._src.dispatch import prim_requires_devices_during_lowering as require_devices

    # Serves explicit mesh axes.
    from jax._src.interpreters.mlir import lower_with_sharding_in_types

    # Reads the shardings that XLA shows while it partitions.
    from jax._src.sharding_impls import parse_flatten_op_sharding
except ImportError as error:
    raise ImportError(
        f"jax_flash {__version__} does not know jax {jax.__version__}: {error}; "
        "install a newer jax_flash or an older jax"
    ) from error

__all__ = [
    "definitely_equal",
    "lower_with_sharding_in_types",
    "parse_flatten_op_sharding",
    "require_devices",
    "sharding_callbacks",
]
