"""The benchmark suite: `python -m benchmarks`. It is not part of the package, and nothing in the package imports it."""
