"""`python -m benchmarks.layers_ahead --trace FILE`: would asking the predictor within a prompt pay?

Two questions. Within a token: when the layers before have chosen, which absent expert will the next layer use, and how
often is that right? A load ahead is worth its bytes only if it is. Within a request: when a chunk of tokens has run,
what does a plan cover of the tokens after it?
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from rich.console import Console
from rich.table import Table

from benchmarks.residency.forecasts import Learned, learn_from
from benchmarks.residency.split import read_traces
from emoe_jax.errors import EmoeError, one_line
from emoe_jax.policies.dynamics import Dynamics
from emoe_jax.predictor import Prompts
from emoe_jax.predictor.layers import LayerPrior
from emoe_jax.predictor.regression import fit_ridge
from emoe_jax.traces import RoutingTrace
from emoe_jax.traces.coverage import coverage

SHARES = (0.25, 0.5)
CERTAINTIES = (0.3, 0.5, 0.7)
"""Expected wishes of the next layer for an expert, from which on it would be loaded."""
CHUNKS = (16, 64, 128)
"""Tokens after which a plan is corrected."""
COVERED = 64
"""Tokens after a chunk on which the plan is judged."""
OWN = 32.0
"""Tokens that a plan counts for beside a chunk's own choices."""
RECENT = 32.0
"""Half-life of the wishes by which experts are resident, in tokens."""
LEARNED_TOKENS = 20_000


class Ahead:
    """Learned from one trace, judged on another."""

    def __init__(self, trained: RoutingTrace, judged: RoutingTrace, learned: Learned):
        self._judged, self._k = judged, judged.top_k
        prior = learned.predictor.prior(with_first=False)
        start = prior.left_out()
        latest = trained.select(range(trained.num_prompts - len(start), trained.num_prompts))
        self._layers, _ = LayerPrior.fit(start, latest.counts(), self._k)
        self._plans = prior.predict(Prompts.of(judged, learned.predictor.config.first_tokens))
        chosen = np.random.default_rng(0).permutation(latest.num_tokens)[:LEARNED_TOKENS]
        wishes = _wishes(latest)[chosen]
        planned = self._k * start[latest.sample[chosen]]
        features = [self._features(wishes, planned, layer) for layer in range(judged.num_layers)]
        self._ridge = [fit_ridge(x, wishes[:, m], [100.0]).weights for m, x in enumerate(features)]
        assert learned.knowledge.transitions is not None
        self._transitions = learned.knowledge.transitions

    def loads(self) -> list[dict[str, Any]]:
        """The most likely absent expert of each layer, loaded where it is expected to be wished for so much: loads per
        token and layer, the share of them that is used, and the share of all misses that these are.
        """
        rows = []
        for share in SHARES:
            slots = max(self._k, round(share * self._judged.num_experts))
            found: dict[str, list[np.ndarray]] = {}
            for wishes, plan in self._requests():
                resident = self._residents(wishes, plan, slots)
                for layer in range(1, self._judged.num_layers):
                    missed = wishes[:, layer] * ~resident[:, layer]
                    for name, expected in self._next(wishes, plan, layer).items():
                        absent = np.where(resident[:, layer], -np.inf, expected)
                        best = absent.argmax(1)[:, None]
                        pair = np.take_along_axis(absent, best, 1), np.take_along_axis(missed, best, 1)
                        found.setdefault(name, []).append(np.hstack([*pair, missed.sum(1, keepdims=True)]))
            for name, parts in found.items():
                certainty, used, misses = np.concatenate(parts).T
                for least in CERTAINTIES:
                    loaded = certainty > least
                    rows.append(
                        {
                            "share": share,
                            "from": name,
                            "certainty": least,
                            "misses": float(misses.mean()),
                            "loads": float(loaded.mean()),
                            "useful": float(used[loaded].mean()) if loaded.any() else None,
                            "misses_spared": float(used[loaded].sum() / max(misses.sum(), 1)),
                        }
                    )
        return rows

    def chunks(self) -> list[dict[str, Any]]:
        """Coverage of the tokens after a chunk, by plan; means over requests that are long enough."""
        rows = []
        for length in CHUNKS:
            found: dict[str, list[list[float]]] = {}
            for wishes, plan in self._requests():
                if len(wishes) < length + COVERED:
                    continue
                shares = wishes[:length].mean(0) / self._k
                given = self._layers.predict(plan[None], shares[None], tokens=float(length))[0]
                weight = length / (length + OWN)
                plans = {
                    "plan": plan,
                    "given earlier layers": given,
                    "plan and own choices": plan + weight * (shares - plan),
                    "given and own choices": given + weight * (shares - given),
                }
                after = wishes[length : length + COVERED].sum(0)
                for name, candidate in plans.items():
                    slots = [round(share * self._judged.num_experts) for share in SHARES]
                    covered = [float(coverage(after, candidate, [count] * len(plan))) for count in slots]
                    found.setdefault(name, []).append(covered)
            for name, covered in found.items():
                means = np.mean(covered, axis=0).tolist()
                by_share = dict(zip(map(str, SHARES), means, strict=True))
                rows.append({"tokens": length, "by": name, "requests": len(covered), "coverage": by_share})
        return rows

    def _requests(self) -> Iterator[tuple[Float[np.ndarray, "tokens M E"], Float[np.ndarray, "M E"]]]:
        """Each judged request's wishes by token, and what was predicted of it."""
        wishes = _wishes(self._judged)
        for prompt, plan in enumerate(self._plans):
            own = wishes[self._judged.sample == prompt]
            if len(own):
                yield own, plan

    def _residents(
        self, wishes: Float[np.ndarray, "tokens M E"], plan: Float[np.ndarray, "M E"], slots: int
    ) -> Bool[np.ndarray, "tokens M E"]:
        """The experts most wished for before each token, beginning at the plan."""
        rates, keep = self._k * plan, 0.5 ** (1 / RECENT)
        resident = np.zeros(wishes.shape, bool)
        for token, wished in enumerate(wishes):
            np.put_along_axis(resident[token], np.argpartition(-rates, slots - 1, axis=1)[:, :slots], True, axis=1)
            rates = keep * rates + (1 - keep) * wished
        return resident

    def _next(
        self, wishes: Float[np.ndarray, "tokens M E"], plan: Float[np.ndarray, "M E"], layer: int
    ) -> dict[str, Float[np.ndarray, "tokens E"]]:
        """Wishes that a layer is expected to have, once all before it have chosen."""
        plans = np.broadcast_to(plan, wishes.shape)
        given = self._layers.predict(plans[:, : layer + 1], wishes[:, : layer + 1] / self._k, layer, tokens=1.0)
        return {
            "given_layers": self._k * given[:, layer],
            "transitions": wishes[:, layer - 1] @ self._transitions[layer - 1] / self._k,
            "ridge on tokens": self._features(wishes, self._k * plans, layer) @ self._ridge[layer],
        }

    def _features(
        self, wishes: Float[np.ndarray, "tokens M E"], planned: Float[np.ndarray, "tokens M E"], layer: int
    ) -> Float[np.ndarray, "tokens features"]:
        return np.hstack([wishes[:, :layer].reshape(len(wishes), -1), planned[:, layer]])


def _wishes(trace: RoutingTrace) -> Float[np.ndarray, "tokens M E"]:
    wishes = np.zeros((trace.num_tokens, trace.num_layers, trace.num_experts), np.float32)
    np.put_along_axis(wishes, trace.experts.astype(np.int64), 1, axis=2)
    return wishes


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers_ahead", description=__doc__)
    parser.add_argument("--trace", type=Path, required=True, metavar="FILE", help="learn from 3/4, judge on 1/4")
    parser.add_argument("--train-trace", type=Path, metavar="FILE", help="learn from this trace, judge on --trace")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    options = parser.parse_args(argv)
    try:
        trained, judged, *_ = read_traces(options.trace, options.train_trace, None)
        dynamics = Dynamics.untrained(trained.num_layers, trained.num_experts)  # not looked at here
        ahead = Ahead(trained, judged, learn_from(trained, dynamics=dynamics))
        numbers = {"loads": ahead.loads(), "chunks": ahead.chunks()}
        if options.json is not None:
            options.json.write_text(json.dumps(numbers, indent=2) + "\n")
    except (EmoeError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 120)
    for title, rows in (("loads ahead, per token and layer", numbers["loads"]), ("after a chunk", numbers["chunks"])):
        table = Table(*(rows[0] if rows else ()), title=title)
        for row in rows:
            table.add_row(*(_text(value) for value in row.values()))
        console.print(table)
    return 0


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return " / ".join(_text(one) for one in value.values())
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
