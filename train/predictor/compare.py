"""`python -m train.predictor.compare`: the paper's Table 2 on a trace; every architecture and variant, same prompts.

Prompts, prior and optimizer steps are the same for all. What is judged are the weights after the last step, averaged as
always but not chosen by the prompts that they are judged on, so a row may be below the prior that it starts from.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from emoe_jax.errors import EmoeError, one_line
from emoe_jax.predictor import Predictor, PredictorConfig, Prompts
from emoe_jax.predictor.config import ARCHITECTURES, VARIANTS
from emoe_jax.predictor.inputs import History
from emoe_jax.predictor.layers import LayerPrior
from emoe_jax.predictor.prompts import frequencies
from emoe_jax.traces import RoutingTrace
from train.predictor import baselines, examples, report, trainer
from train.predictor.coverage import scores
from train.predictor.evaluate import Shares, time_predictions
from train.predictor.examples import Examples, HeldOutSplit, Opinions
from train.predictor.trainer import Hyperparameters
from train.ranges import CommandParser


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(prog="python -m train.predictor.compare", description=__doc__)
    add = parser.add_argument
    add("--traces", type=Path, required=True, help="routing trace (.npz)")
    add("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    add("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--steps", type=int, default=150, help="optimizer steps of every row")
    add("--members", type=int, default=1, help="networks averaged")
    add("--seed", type=int, default=0, help="of weights, batches and the held-out prompts")
    add("--held-out", type=float, default=Hyperparameters.held_out, help="share of prompts to judge by")
    add("--without-prior", action="store_true", help="networks start from global frequency and learn all by themselves")
    add("--shuffle-labels", action="store_true", help="control: deal the training prompts' routing to others")
    add("--json", type=Path, help="write the numbers here")
    options = parser.parse_args(argv)
    for name, low, high in (("steps", 1, 10**7), ("members", 1, 64), ("seed", 0, 2**31 - 1), ("held_out", 0.02, 0.5)):
        value = getattr(options, name)
        if not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be between {low} and {high}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    console = Console()
    try:
        trace = RoutingTrace.load(options.traces)
        numbers = compare(trace, options, console)
        print_table(numbers, console)
        if options.json:
            report.write_json(numbers, options.json)
    except (EmoeError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def compare(trace: RoutingTrace, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """One row per architecture and variant, and what they must beat, before any answer token."""
    config = PredictorConfig(
        trace.num_layers,
        trace.num_experts,
        trace.top_k,
        embedding_dim=0 if trace.prompt_embedding is None else trace.prompt_embedding.shape[1],
        members=options.members,
    )
    prompts = Prompts.of(trace, config.first_tokens).routed()
    split = HeldOutSplit.draw(prompts, options.held_out, options.seed)
    held_out = prompts.take(split.held_out)
    if options.shuffle_labels:
        prompts = _shuffled(prompts, split, options.seed)
    trained = prompts.take(split.train)
    predictor, *both = examples.prepare(prompts, split, config)
    prior: Shares = both[1].priors.plain
    if options.without_prior:
        predictor.layers = LayerPrior.ignorant(config)
        both = [_without_prior(predictor, prompts, rows, trained) for rows in (split.train, split.held_out)]
    closed = scores(both[1].priors.given, held_out.counts, config.top_k)
    rows: dict[str, dict[str, Any]] = {
        "prior alone": scores(prior, held_out.counts, config.top_k) | {"given_earlier_layers": closed},
        "ridge": scores(baselines.ridge(trained, held_out, with_first=False), held_out.counts, config.top_k),
        "global frequency": scores(baselines.global_frequency(trained, held_out), held_out.counts, config.top_k),
    }
    histories = [History.of(prompts.counts)[row] for row in split.held_out]
    plan = Hyperparameters(options.steps, options.seed, held_out=options.held_out, shuffled=options.shuffle_labels)
    for variant in options.variant:
        for arch in options.arch:
            console.print(f"{arch}, {variant}: {options.steps} steps")
            predictor.config = dataclasses.replace(config, arch=arch, variant=variant)
            for examples_of in both:
                examples_of.follows_layers = variant == "layer-by-layer"
            state = trainer.run(predictor, both[0], both[1], plan, None, lambda progress: None)
            predictor.weights = state.averaged
            starts = both[1].priors.plain
            predicted = predictor.correct(held_out, starts, histories, with_first=False)
            row = scores(predicted, held_out.counts, config.top_k)
            if variant == "layer-by-layer":
                given = predictor.given_layers(held_out, starts, histories, frequencies(held_out.counts))
                row["given_earlier_layers"] = scores(given, held_out.counts, config.top_k)
            row["parameters"] = predictor.num_parameters
            row["milliseconds_per_prediction"] = time_predictions(predictor, held_out)
            rows[f"{arch}, {variant}"] = row
    return {
        "trace": str(options.traces),
        "prompts": len(held_out),
        "steps": options.steps,
        "members": options.members,
        "without_prior": options.without_prior,
        "shuffled_labels": options.shuffle_labels,
        "rows": rows,
    }


def _shuffled(prompts: Prompts, split: HeldOutSplit, seed: int) -> Prompts:
    """The training prompts' routing dealt among them; what is judged by stays true."""
    order = np.arange(len(prompts))
    order[split.train] = np.random.default_rng(seed).permutation(split.train)
    return dataclasses.replace(prompts, counts=prompts.counts[order], first=prompts.first[order])


def _without_prior(predictor: Predictor, prompts: Prompts, rows: np.ndarray, trained: Prompts) -> Examples:
    """Examples in which global frequency takes the closed forms' place."""
    chosen = prompts.take(rows)
    start = np.array(baselines.global_frequency(trained, chosen)) + np.float32(1e-6)
    start /= start.sum(-1, keepdims=True)
    histories = History.of(prompts.counts)
    return Examples(predictor, chosen, [histories[row] for row in rows], Opinions(start, start, start))


def print_table(numbers: dict[str, Any], console: Console) -> None:
    """Coverage per residency, the paper's top-k accuracy, and precision, recall and F1 at 50 %."""
    table = Table(title=f"{numbers['prompts']} held-out prompts, {numbers['steps']} steps, before any answer token")
    table.add_column("")
    for name in ("25 %", "50 %", "75 %", "top-k", "P", "R", "F1", "KL", "ms", "given earlier layers: 50 %", "top-k"):
        table.add_column(name, justify="right")
    for name, row in numbers["rows"].items():
        given = row.get("given_earlier_layers")
        table.add_row(
            name,
            *(f"{value:.4f}" for value in row["coverage"].values()),
            f"{row['top_k_accuracy']:.3f}",
            *(f"{row[key]['0.5']:.3f}" for key in ("precision", "recall", "f1")),
            f"{row['kl']:.3f}",
            f"{row['milliseconds_per_prediction']:.1f}" if "milliseconds_per_prediction" in row else "",
            *((f"{given['coverage']['0.5']:.4f}", f"{given['top_k_accuracy']:.3f}") if given else ("", "")),
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
