"""The ways of serving that are compared, as the paper names them."""

from __future__ import annotations

from typing import Any, NamedTuple

from emoe_jax.requests.contract import RoutingContract


class Mode(NamedTuple):
    """One way: how many experts are resident, what absent ones mean, and who decides which they are."""

    routing: RoutingContract
    policy: str
    everything: bool = False
    """Whether all experts are resident, whatever share the others get."""
    predict_every: int | None = None
    """Prompts that share a prediction; None leaves it to the engine."""

    def options(self, share: float) -> dict[str, Any]:
        """Keywords of `Engine.load`; `share` (0 to 1) of the experts is resident."""
        amount = "100%" if self.everything else f"{100 * share:g}%"
        options: dict[str, Any] = {"expert_memory": amount, "routing": self.routing, "policy": self.policy}
        return options if self.predict_every is None else options | {"predict_every": self.predict_every}


MODES: dict[str, Mode] = {
    "all": Mode("resident", "static", everything=True),
    "emoe": Mode("resident", "emoe"),
    "emoe-e": Mode("resident", "emoe", predict_every=1),
    "on-demand": Mode("exact", "lru"),
    "pre-gated": Mode("exact", "pre-gated"),
    # Experts of the recorded requests whose activations are most like those of the running ones, between steps.
    "infinity": Mode("exact", "activation-matrix"),
}
