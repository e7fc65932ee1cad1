"""The JAX libraries' own attention tests, run through this library's adapters: `python -m tools.libraries`."""
