"""`python -m benchmarks.ablation --trace FILE`: what each part of the policy `emoe` is worth, by leaving it out.

A trace is replayed as in `python -m benchmarks.residency`: with everything, then without one part at a time. What
others learn from a part, they learn anew without it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.table import Table

from benchmarks.arguments import count
from benchmarks.residency.forecasts import Learned, Report, learn_from, predicted
from benchmarks.residency.grid import slots, swaps_per_step
from benchmarks.residency.replay import replay
from benchmarks.residency.split import read_traces
from benchmarks.residency.stream import Stream, make_plans, make_stream
from emoe_jax.errors import EmoeError, one_line, require
from emoe_jax.policies.caching import Fixed
from emoe_jax.policies.dynamics import Dynamics
from emoe_jax.policies.learning import learn_dynamics
from emoe_jax.policies.refresh import Refresh
from emoe_jax.policies.rule import Rule
from emoe_jax.predictor import Predictor
from emoe_jax.predictor.inputs import History
from emoe_jax.predictor.layers import LayerPrior
from emoe_jax.predictor.prompts import Prompts, frequencies
from emoe_jax.traces import RoutingTrace
from train.predictor.answers import learn_answers
from train.predictor.coverage import coverage_at

SHARES = (0.25, 0.5)
PARTS = (
    *("prior", "network", "tokens", "embedding", "history", "earlier layers", "last tokens", "refresh", "dynamics"),
    *("sensitivity", "drift", "gate"),
)
_ENGINE_ONLY = {
    "sensitivity": "replay has no task profile, and every layer of it exchanges experts on its own",
    "drift": "replay asks on time; drift is what the engine's planner adds to that",
    "gate": "replay has no gate; it closes in an engine whose predictor does worse than frequency",
}


class Case(NamedTuple):
    """What is replayed: what a plan expects of each prompt, and the rule that follows its wishes."""

    shares: Float[np.ndarray, "P M E"]
    rule: Rule[Any]


@dataclasses.dataclass
class Ablation:
    """Everything learned from one trace, and another one to replay."""

    trained: RoutingTrace
    replayed: RoutingTrace
    learned: Learned
    predict_every: int
    concurrency: int
    report: Report

    def __post_init__(self) -> None:
        self._stream: Stream = make_stream(self.replayed, self.concurrency)
        dynamics = self.learned.knowledge.dynamics
        assert dynamics is not None
        self._dynamics: Dynamics = dynamics
        self._shares = self._predicted(self.learned.predictor)

    def rows(self, parts: Sequence[str]) -> list[dict[str, Any]]:
        """The first row is with everything. `worth` is in points of coverage: what is lost without the part."""
        whole = self._replayed(Case(self._shares, Refresh(self._dynamics)))
        rows = [{"without": "nothing", **whole}]
        for part in parts:
            self.report(f"without {part}")
            case = _ENGINE_ONLY.get(part) or self._case(part)
            if isinstance(case, str):
                numbers: dict[str, Any] = {**whole, "note": case}
            else:
                numbers = self._replayed(case)
            if part == "earlier layers":
                numbers |= {"forecast": self._earlier_layers()}
            lost = {key: 100 * (whole["coverage"][key] - value) for key, value in numbers["coverage"].items()}
            rows.append({"without": part, **numbers, "worth": lost})
        return rows

    def _case(self, part: str) -> Case | str:
        """What is left without the part; a sentence where replay cannot tell."""
        predictor, dynamics = self.learned.predictor, self._dynamics
        if part == "prior":
            known = len(self.learned.left_out)
            return self._learned_anew(self._global(known), self._global(len(self._shares)))
        if part == "network":
            bare = _without_network(predictor)
            return Case(self._predicted(bare), Refresh(dynamics._replace(network=None)))
        if part == "tokens":
            if predictor.tokens is None or self.replayed.prompt_tokens is None:
                return "this trace holds no tokens of prompts, or the predictor does not read them"
            asked = self._predicted(_without_tokens(predictor))
            return self._learned_anew(predictor.prior(with_first=False).left_out(), asked)
        if part == "embedding":
            if predictor.config.embedding_dim == 0:
                return "prompts of this trace come without embeddings"
            blind = learn_from(self.trained.without_embedding(), None, dynamics)
            asked = predicted(blind.predictor, self.replayed.without_embedding(), self.predict_every)
            return self._learned_anew(blind.left_out, asked)
        if part == "history":
            if predictor.weights is None:
                return "only the networks of a trained predictor look at it (--predictor)"
            return Case(self._predicted(predictor, with_history=False), Refresh(dynamics))
        if part == "earlier layers":
            return "a step computes all layers in one call, so that replay has no moment to use them"
        if part == "last tokens":
            return Case(self._shares, Refresh(_own_only(dynamics)))
        if part == "refresh":
            return Case(self._shares, Fixed())
        assert part == "dynamics"
        untrained = Dynamics.untrained(self.trained.num_layers, self.trained.num_experts)
        return Case(self._shares, Refresh(untrained))

    def _predicted(self, predictor: Predictor, with_history: bool = True) -> Float[np.ndarray, "P M E"]:
        return predicted(predictor, self.replayed, self.predict_every, with_history)

    def _global(self, number: int) -> Float[np.ndarray, "P M E"]:
        shares = frequencies(self.learned.prompts.counts.sum(0))
        return np.broadcast_to(shares, (number, *shares.shape))

    def _learned_anew(self, plan: Float[np.ndarray, "P M E"], asked: Float[np.ndarray, "P M E"]) -> Case:
        """Dynamics of answers whose prompts, the latest ones, were planned for like this."""
        routed = np.flatnonzero(np.bincount(self.trained.sample, minlength=self.trained.num_prompts))
        learn = learn_answers if self._dynamics.network is not None else learn_dynamics
        return Case(asked, Refresh(learn(self.trained.select(routed[-len(plan) :]), plan)))

    def _replayed(self, case: Case) -> dict[str, Any]:
        trace, stream = self.replayed, self._stream
        E, k = trace.num_experts, trace.top_k
        capacities = [[slots(share, E, k)] * trace.num_layers for share in SHARES]
        is_fixed = isinstance(case.rule, Fixed)
        limit = 0 if is_fixed else swaps_per_step("emoe", self.concurrency, E, k)
        totals = replay(stream, E, capacities, case.rule, make_plans(stream, case.shares, k), limit)
        wishes = stream.num_tokens * trace.num_layers
        keys = [f"{share:g}" for share in SHARES]
        return {
            "coverage": dict(zip(keys, (totals.hits / (wishes * k)).tolist(), strict=True)),
            "moved": dict(zip(keys, (totals.moved / wishes).tolist(), strict=True)),
        }

    def _earlier_layers(self) -> dict[str, dict[str, float]]:
        """Coverage of a prompt's set without and with the routing of earlier layers, which is where they count."""
        prior, remembered = self.learned.predictor.prior(with_first=False), self.learned.predictor.memory
        layers, _ = LayerPrior.fit(prior.left_out(), remembered.counts, self.trained.top_k)
        config = self.learned.predictor.config
        prompts = Prompts.of(self.replayed, config.first_tokens, config.embedding_dim).routed()
        asked = self.learned.predictor.predict_many(prompts, History.of(prompts.counts), with_first=False)
        given = layers.predict(asked, frequencies(prompts.counts))
        shares = {f"{share:g}": share for share in SHARES}
        return {
            "without": {key: coverage_at(asked, prompts.counts, share) for key, share in shares.items()},
            "with": {key: coverage_at(given, prompts.counts, share) for key, share in shares.items()},
        }


def _without_network(predictor: Predictor) -> Predictor:
    return Predictor(predictor.config, predictor.trained, None, predictor.memory, predictor.layers, predictor.tokens)


def _without_tokens(predictor: Predictor) -> Predictor:
    return Predictor(predictor.config, predictor.trained, predictor.weights, predictor.memory, predictor.layers)


def _own_only(dynamics: Dynamics) -> Dynamics:
    """Each expert by its own plan and decayed wishes."""
    size = dynamics.readout.shape[1]
    nothing = {"directions": np.zeros((size, 0), np.float32), "readout": np.zeros((0, size), np.float32)}
    return dynamics._replace(**nothing, network=None)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        require("optax")
        numbers = run(options, console)
        print_table(numbers, console)
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(numbers, indent=1) + "\n")
    except (EmoeError, ImportError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__)
    add = parser.add_argument
    add("--trace", type=Path, required=True, metavar="FILE", help="routing trace to replay")
    add("--train-trace", type=Path, metavar="FILE", help="learn from this trace and replay all of --trace")
    add("--predictor", type=Path, metavar="DIR", help="trained predictor (default: learned from the training prompts)")
    add("--predict-every", type=count, default=1, metavar="P", help="prompts that share a prediction (default 1)")
    add("--concurrency", type=count, default=1, metavar="R", help="requests side by side (default 1)")
    add("--without", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    add("--json", type=Path, metavar="FILE", help="write the numbers here")
    return parser.parse_args(argv)


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """`{"ablation": rows, "setting": ...}`."""
    given = read_traces(options.trace, options.train_trace, options.predictor)
    trained, replayed, predictor, dynamics = given.trained, given.replayed, given.predictor, given.dynamics
    if given.warning:
        console.print(f"warning: {given.warning}", markup=False)

    def report(line: str) -> None:
        console.print(line, style="dim")

    learned = learn_from(trained, predictor, dynamics, report)
    ablation = Ablation(trained, replayed, learned, options.predict_every, options.concurrency, report)
    setting = {
        "trained_prompts": trained.num_prompts,
        "replayed_prompts": replayed.num_prompts,
        "predict_every": options.predict_every,
        "concurrency": options.concurrency,
    }
    return {"ablation": ablation.rows(options.without), "setting": setting}


def print_table(numbers: dict[str, Any], console: Console) -> None:
    """One row per part: what is covered and moved without it, and what it is worth."""
    setting = numbers["setting"]
    title = (
        f"{setting['replayed_prompts']} prompts replayed, {setting['concurrency']} at a time, learned from "
        f"{setting['trained_prompts']}, one prediction per {setting['predict_every']}"
    )
    table = Table(title=title)
    table.add_column("without")
    for share in SHARES:
        for name in ("coverage", "moved", "worth, points"):
            table.add_column(f"{name} {share:.0%}", justify="right")
    table.add_column("")
    for row in numbers["ablation"]:
        cells = []
        for share in SHARES:
            key = f"{share:g}"
            worth = f"{row['worth'][key]:+.2f}" if "worth" in row and "note" not in row else ""
            cells += [f"{row['coverage'][key]:.4f}", f"{row['moved'][key]:.4f}", worth]
        table.add_row(row["without"], *cells, row.get("note", ""))
    console.print(table)
    for row in numbers["ablation"]:
        if "forecast" in row:
            pairs = (
                f"{float(key):.0%}: {value:.4f} -> {row['forecast']['with'][key]:.4f}"
                for key, value in row["forecast"]["without"].items()
            )
            console.print(f"a prompt's set, without -> with {row['without']}: {'; '.join(pairs)}")


if __name__ == "__main__":
    sys.exit(main())
