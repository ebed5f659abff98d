"""`python -m benchmarks.serving`: requests in an arrival process, simulated or against a running server."""
