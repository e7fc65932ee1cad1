"""The version: the one place that the wheels, the C++ libraries and `jax_flash.__version__` read."""

__version__ = "0.1.0"
