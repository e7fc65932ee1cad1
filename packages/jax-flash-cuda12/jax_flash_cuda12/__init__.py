"""The CUDA 12 kernels of jax_flash: one shared library, found and loaded by jax_flash."""
