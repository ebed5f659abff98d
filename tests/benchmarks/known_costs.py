"""A machine whose costs are known, for what is predicted of it."""

from emoe_jax.planning.targets import Target

MACHINE = Target("here", "cpu", 2**30, bandwidth=1e9, link=1e9, half_flops=1e9, float32_flops=1e10)
COSTS = {
    "layers": 5e-5,
    "rows": 4e-6,
    "choices": 2e-6,
    "repeated_bytes": 2e-11,
    "packed_bytes": 5e-11,
    "operations": 1e-11,
    "memory_bytes": 4e-11,
}
"""Seconds per unit of each part of a step."""
