"""Which experts should be resident: policies as pure functions, for the engine and for replay alike."""

from emoe_jax.policies.policy import ResidencyPolicy, Swap
from emoe_jax.policies.registry import POLICIES, PolicyWeights, make_policy

__all__ = ["POLICIES", "PolicyWeights", "ResidencyPolicy", "Swap", "make_policy"]
