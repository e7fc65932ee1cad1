"""`python -m benchmarks`: this library beside its peers and beside other commits of itself; see README.md here."""
