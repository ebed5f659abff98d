"""What every backend of the MoE op computes with."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int

from emoe_jax.experts.weights import ExpertWeights


class Operands(NamedTuple):
    """One call of the op. An id of `E` is no assignment, and an expert whose slot is the capacity is absent."""

    rows: Float[Array, "R D"]
    ids: Int[Array, "R k"]
    weights: Float[Array, "R k"]
    slot_of_expert: Int[Array, " E"]
    experts: ExpertWeights
    accumulator: Float[Array, "R D"]
    """What the weighted outputs are added to."""
