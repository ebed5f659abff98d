"""`python -m benchmarks.figures`: the figures of the eMoE paper that a routing trace is enough for."""
