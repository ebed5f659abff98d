"""What a scheduling policy is measured under: how many experts are resident, and the routing contract."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from emoe_jax.requests.contract import RoutingContract

ALL = "100%"


class Setting(NamedTuple):
    """What is resident, such as `40%`, and the contract of all requests. None: what a server does by default."""

    residency: str | None = None
    routing: RoutingContract | None = None

    @property
    def server_arguments(self) -> list[str]:
        residency = [] if self.residency is None else ["--expert-memory", self.residency]
        return residency + ([] if self.routing is None else ["--routing", self.routing])

    def of(self, report: dict[str, Any], seed: int) -> dict[str, Any]:
        """A report whose runs say that they were of this setting and this seed."""
        return report | {"runs": [{**self._asdict(), "seed": seed, **run} for run in report["runs"]]}


def settings_of(residencies: Sequence[str] | None, contracts: Sequence[RoutingContract] | None) -> list[Setting]:
    """Every pair of them. Where all experts are resident the contracts do the same, so the first one stands for all."""
    contracts = contracts or []
    return [
        Setting(residency, routing)
        for residency in residencies or [None]
        for routing in (contracts[:1] if residency == ALL else contracts) or [None]
    ]
