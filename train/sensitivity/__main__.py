"""`python -m train.sensitivity`: randomise the routing of a model's layers, see which tasks suffer, write it down."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from emoe_jax import EmoeError
from emoe_jax.checkpoint import Tokenizer
from emoe_jax.demo import demo_model
from emoe_jax.errors import ConfigError, one_line, require
from emoe_jax.models import load_tokenizer
from emoe_jax.tasks import TaskProfile
from train import prompts as labelled
from train.demo.evaluate import EXACT_TASKS
from train.progress import progress_bar
from train.prompts import Prompt
from train.ranges import CommandParser, check_ranges
from train.sensitivity import profile, report
from train.sensitivity.embedding import embedding_model
from train.sensitivity.forward import RandomisedModel
from train.sensitivity.measure import Follower, generate
from train.sensitivity.profile import COSINE, EXACT, ROUGE, Outputs
from train.tasks import TASKS

DIVERGENCE, THRESHOLD = "divergence", "threshold"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(prog="python -m train.sensitivity", description=__doc__)
    add = parser.add_argument
    add("--model", default=str(demo_model()), help="checkpoint directory or hub id (the bundled demo model)")
    add("--profile", type=Path, metavar="FILE", help="task profile to make, or to update where it exists")
    add("--prompts", type=Path, metavar="FILE", help="JSONL of task and prompt or messages, instead of drawn prompts")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="tasks to draw prompts of")
    add("--prompts-per-task", type=int, default=64, help="of drawn prompts, and at most so many of a file's")
    add("--split", choices=("train", "test"), default="train", help="which phrases and names drawn prompts may use")
    add("--seed", type=int, default=0, help="of the prompts and of the random experts")
    add("--max-tokens", type=int, default=48, help="longest answer")
    add("--depths", type=int, default=8, help="how many numbers of first layers to randomise, up to all")
    add("--threshold", type=float, default=0.85, help="similarity above which layers count as insensitive")
    add(
        "--by",
        choices=(DIVERGENCE, THRESHOLD),
        default=THRESHOLD,
        help="what the profile's sensitivity is: 0 and 1 as in the paper, or the harm of each layer alone",
    )
    add("--exact", nargs="*", metavar="TASK", default=list(EXACT_TASKS), help="tasks whose answers are right or wrong")
    add(
        "--embedding-model", metavar="ID", help="compare other answers by this sentence-transformers model, not ROUGE-L"
    )
    add("--batch", type=int, default=32, help="sequences computed together")
    add("--json", type=Path, metavar="FILE", help="write the numbers here")
    add("--plots", type=Path, metavar="DIR", help="write similarity.png and divergence.png there")
    options = parser.parse_args(argv)
    ranges = {
        "prompts_per_task": (1, 10**6),
        "seed": (0, 2**31 - 1),
        "max_tokens": (1, 10**6),
        "depths": (1, 10**4),
        "threshold": (0, 1),
        "batch": (1, 4096),
    }
    check_ranges(parser, options, ranges)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    console = Console()
    try:
        numbers = measure(options, console)
        report.print_tables(numbers, console)
        if options.json is not None:
            options.json.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
        if options.plots is not None:
            report.plot(numbers, options.plots)
    except (EmoeError, ImportError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All numbers; the profile, if there is to be one, has been written."""
    for file in (options.profile, options.json):
        if file is not None and not file.parent.is_dir():
            raise ConfigError(f"{file}: the folder {file.parent} does not exist")
    if options.plots is not None:
        require("matplotlib")
        options.plots.mkdir(parents=True, exist_ok=True)
    prompts = _prompts(options)
    model = RandomisedModel(options.model, options.seed, options.batch)
    known = TaskProfile.empty(model.config)
    if options.profile is not None and options.profile.exists():
        known = TaskProfile.load(options.profile)
        known.check(model.config)
    numbers = _numbers(model, prompts, options, console)
    if options.profile is not None:
        for task, entry in numbers["tasks"].items():
            known = known.with_task(task, sensitivity=tuple(entry["sensitivity"]))
        known.save(options.profile)
    return numbers


def _prompts(options: argparse.Namespace) -> list[Prompt]:
    if options.prompts is None:
        return labelled.drawn(options.tasks, options.split, options.seed, options.prompts_per_task)
    prompts = labelled.read(options.prompts)
    by_task = [[p for p in prompts if p.task == task] for task in labelled.tasks_of(prompts)]
    return [prompt for some in by_task for prompt in some[: options.prompts_per_task]]


def _encoded(prompts: list[Prompt], model: RandomisedModel, tokenizer: Tokenizer, max_tokens: int) -> list[list[int]]:
    encoded = [prompt.token_ids(tokenizer) for prompt in prompts]
    for prompt, token_ids in zip(prompts, encoded, strict=True):
        if not 0 < len(token_ids) <= model.max_tokens - max_tokens:
            raise ConfigError(
                f"a prompt of {prompt.task} has {len(token_ids)} tokens; with --max-tokens {max_tokens} it must have "
                f"1 to {model.max_tokens - max_tokens}"
            )
    return encoded


def _numbers(
    model: RandomisedModel, prompts: list[Prompt], options: argparse.Namespace, console: Console
) -> dict[str, Any]:
    embed = None if options.embedding_model is None else embedding_model(options.embedding_model)
    tokenizer = load_tokenizer(model.directory)
    if tokenizer is None:
        raise ConfigError(f"{options.model} has no tokenizer, so prompts in words cannot be run")
    encoded = _encoded(prompts, model, tokenizer, options.max_tokens)
    num_layers = len(model.config.moe_layers)
    progressive, single = profile.patterns(num_layers, options.depths)
    with progress_bar(console, "prompts") as progress:
        bar = progress.add_task("resident answers", total=len(progressive) + 2)

        def answers(random_layers: np.ndarray) -> Outputs:
            tokens = generate(model, encoded, random_layers, options.max_tokens, options.batch)
            progress.advance(bar)
            return Outputs(tokens, [tokenizer.decode(ids) for ids in tokens])

        resident = answers(np.zeros(num_layers, bool))
        progress.update(bar, description="first layers random")
        random = [answers(pattern) for pattern in progressive]
        progress.update(bar, description="divergence by layer")
        follower = Follower(model, encoded, resident.tokens, options.batch)
        deviations = follower.deviations([*progressive, *single])
        progress.advance(bar)
    tokens = follower.num_tokens()
    tasks: dict[str, Any] = {}
    for task in labelled.tasks_of(prompts):
        rows = [row for row, prompt in enumerate(prompts) if prompt.task == task]
        judge = EXACT if task in options.exact else ROUGE if embed is None else COSINE
        depths = []
        for pattern, other, deviation in zip(progressive, random, deviations, strict=False):
            alike = profile.by_prompt(resident, other, rows, embed)
            row = {name: float(values.mean()) for name, values in alike.items()}
            row |= profile.deviation_numbers(deviation, tokens, rows)
            judged = {"similarity": row[judge], "similarity_ci95": profile.interval(alike[judge])}
            depths.append({"layers": int(pattern.sum()), **judged, **row})
        alone = [profile.deviation_numbers(deviation, tokens, rows) for deviation in deviations[len(progressive) :]]
        tasks[task] = {
            "prompts": len(rows),
            "answer_tokens": float(tokens[rows].mean()),
            "judged_by": judge,
            "progressive": depths,
            "single": [{"layer": layer, **row} for layer, row in enumerate(alone)],
            "insensitive_layers": profile.insensitive_layers(depths, options.threshold),
        }
    kl, errors = ([[row[key] for row in entry["single"]] for entry in tasks.values()] for key in ("kl", "kl_error"))
    harm = profile.by_divergence(np.array(kl), np.array(errors))
    for entry, by_divergence in zip(tasks.values(), harm, strict=True):
        by_threshold = profile.by_threshold(entry["insensitive_layers"], num_layers)
        entry["sensitivity"] = (by_divergence if options.by == DIVERGENCE else by_threshold).round(6).tolist()
    return {
        "model": model.directory.name,
        "num_layers": num_layers,
        "threshold": options.threshold,
        "by": options.by,
        "seed": options.seed,
        "tasks": tasks,
    }


if __name__ == "__main__":
    sys.exit(main())
