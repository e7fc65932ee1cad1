"""`python -m benchmarks`: this library beside its peers, in one process, on the tests' own cases."""
