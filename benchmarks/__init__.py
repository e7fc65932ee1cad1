"""`python -m benchmarks`: compares this library with its peers and with other commits of itself; see README.md."""
