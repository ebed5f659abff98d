"""The demo, or another checkpoint, under each contract: quality, loads, waits and speed of the same traffic."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.contracts.account import Account
from benchmarks.contracts.shapes import Shapes, scaled_link_gbps
from benchmarks.quality.measure import FULL, Traffic, measured
from benchmarks.quality.scores import mean_over
from benchmarks.quality.served import Cell, engine_of, outcomes
from benchmarks.quality.traffic import in_bursts
from emoe_jax import Engine
from emoe_jax.requests.contract import RoutingContract

Tell = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A contract, and the tolerance where it is `bounded`."""

    contract: RoutingContract
    tolerance: float | None = None

    @property
    def name(self) -> str:
        """`bounded 0.2`, or the contract."""
        return self.contract if self.tolerance is None else f"{self.contract} {self.tolerance:g}"


def settings_of(tolerances: Sequence[float]) -> list[Setting]:
    """`exact`, `bounded` from the least tolerance to the largest, `resident`."""
    return [Setting("exact"), *(Setting("bounded", each) for each in sorted(tolerances)), Setting("resident")]


def measure(
    model: str,
    settings: Sequence[Setting],
    shares: Sequence[float],
    batches: Sequence[int],
    policy: str,
    traffic: Traffic,
    seed: int,
    link_gbps: float | None,
    tell: Tell,
    shapes: Shapes | None = None,
) -> Iterator[dict[str, Any]]:
    """A row for each setting, share and batch. Perplexity and similarity are against all experts resident.

    With `shapes` the link is modelled so that a load takes as many layer times as it would for a model of these
    shapes over `shapes.link`. A layer time is that of the same traffic with all experts resident.

    `loads_per_token` are those that a step waited for, over all tokens computed; `waits_per_token` counts forwards that
    had to be repeated or went layer by layer in the same way. `tokens_per_s` counts time in steps only, and `account`
    says what for.
    """
    stream = in_bursts(traffic.items, seed)
    for batch in batches:
        everything = dataclasses.replace(FULL, policy="static")
        with engine_of(model, everything, traffic.context, batch, seed) as engine:
            watch = _Watch(engine)
            reference = outcomes(engine, stream, batch, lambda: None)
            if shapes is not None:
                layer = watch.step_seconds() / len(engine.config.moe_layers)
                link_gbps = scaled_link_gbps(shapes, batch, layer, engine.parts.residency.expert_bytes)
                tell(f"batch {batch}: a layer takes {1e3 * layer:.2f} ms, so the link gives {1e3 * link_gbps:.3g} MB/s")
        for share in shares:
            for setting in settings:
                tell(f"{setting.name}, {share:.0%} resident, batch {batch}")
                options: dict[str, Any] = {"link_gbps": link_gbps}
                if setting.tolerance is not None:
                    options["tolerance"] = setting.tolerance
                cell = Cell(policy, setting.contract, share, tuple(options.items()))
                began = time.monotonic()
                with engine_of(model, cell, traffic.context, batch, seed) as engine:
                    watch, account = _Watch(engine), Account(engine)
                    found = outcomes(engine, stream, batch, lambda: None)
                    counted = watch.counted() | {"account": account.row()}
                    state = engine.state()
                rows = measured(cell, stream, [found], reference, seed, began, state).rows
                answered = [row for row in rows if row.numbers["similarity"] is not None]
                yield {
                    "contract": setting.contract,
                    "tolerance": setting.tolerance,
                    "share": share,
                    "batch": batch,
                    "perplexity_ratio": mean_over("perplexity_ratio", rows)[0],
                    "perplexity_ci95": list(mean_over("perplexity_ratio", rows)[1:]),
                    "similarity": mean_over("similarity", answered)[0] if answered else None,
                    "substituted_weight": mean_over("substituted_weight", rows)[0],
                    "link_gbps": link_gbps,
                    **counted,
                }


class _Watch:
    """Loads, steps and tokens of an engine since a moment."""

    def __init__(self, engine: Engine):
        self._engine, self._tokens = engine, 0
        dispatch = engine.loop.dispatcher.dispatch

        def counting(plan: Any) -> Any:
            self._tokens += plan.num_tokens
            return dispatch(plan)

        engine.loop.dispatcher.dispatch = counting
        self._before = self._now()

    def _now(self) -> dict[str, float]:
        loads, forwards = self._engine.parts.residency.loads, self._engine.loop.dispatcher.forwards
        return {
            "loads": loads.waited_loads,
            "background": loads.loads - loads.waited_loads,
            "seconds": self._engine.loop.step_seconds,
            "steps": self._engine.loop.steps,
            **forwards,
        }

    def step_seconds(self) -> float:
        """Mean of the steps so far."""
        now = self._now()
        return (now["seconds"] - self._before["seconds"]) / (now["steps"] - self._before["steps"])

    def counted(self) -> dict[str, Any]:
        now = self._now()
        since = {name: now[name] - before for name, before in self._before.items()}
        tokens = max(1, self._tokens)
        return {
            "loads_per_token": since["loads"] / tokens,
            "background_loads_per_token": since["background"] / tokens,
            "waits_per_token": (since["again"] + since["layered"]) / tokens,
            "tokens_per_s": tokens / max(1e-9, since["seconds"]),
            "forwards": {name: since[name] for name in ("whole", "again", "layered")},
        }
