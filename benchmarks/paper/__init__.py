"""The eMoE paper's measured claims, one row each; `python -m benchmarks.paper` measures them."""
