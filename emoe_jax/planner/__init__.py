"""From the requests at hand to the experts that should be there before their tokens: eMoE's expert loading."""

from emoe_jax.planner.capacities import split_slots
from emoe_jax.planner.invocations import PredictEvery, checked_every
from emoe_jax.planner.planner import ResidencyPlanner

__all__ = ["PredictEvery", "ResidencyPlanner", "checked_every", "split_slots"]
