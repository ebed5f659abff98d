"""Measurements: `python -m benchmarks.<name> --json FILE` prints a table and writes its numbers."""
