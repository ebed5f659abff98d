"""`python -m train.classifier`: how well the keywords of a profile tell tasks, on prompts that taught none of them.

Drawn prompts are of the test split: their instructions and questions are worded in ways that never occur in the
training split, which keywords are learned from. The unrelated texts are other ones than keywords are contrasted with.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from emoe_jax.demo import demo_model
from emoe_jax.errors import ConfigError, EmoeError, one_line
from emoe_jax.tasks import OTHER, TaskClassifier, TaskProfile
from train import prompts as labelled
from train.keywords import demo_prompts, with_demo_keywords
from train.ranges import CommandParser
from train.tasks import TASKS

UNRELATED = tuple(
    line.strip()
    for line in """
    The mitochondrion produces most of the chemical energy of a cell.
    def add(a, b): return a + b
    Write a JavaScript function that debounces another function.
    Translate 'good luck' into Japanese.
    What is 17 times 23?
    What is the capital of Mongolia?
    Generate a random password with twelve characters.
    Simmer the onions in butter for ten minutes, then add the stock.
    The bill was passed by the senate with a majority of six votes.
    Gold has the atomic number 79.
    Explain quantum entanglement in simple terms.
    Error: cannot open shared object file
    x = [1, 2, 3]; print(sum(x))
    The knight rode through the dark forest until he reached the river.
    Die Sonne scheint, und die Vögel singen.
    今日は天気がいいですね
    asdf qwer zxcv
    1 2 3 4 5
    ...
    Sort these words alphabetically: pear, apple, fig.
    How do I revert the last commit in git?
    Create a table of the moons of Jupiter with their diameters.
    A triangle has sides of 3, 4 and 5 metres; find its area.
    Give three examples of irony in Hamlet.
    CREATE TABLE users (id INTEGER PRIMARY KEY, email TEXT NOT NULL);
    Draft a resignation letter with two weeks of notice.
    The patient presented with fever and a stiff neck.
    La biblioteca abre a las nueve de la mañana.
    Which is heavier, a kilogram of feathers or a kilogram of lead?
    Implement binary search in Rust.
    Light travels about 300,000 kilometres per second in a vacuum.
    Recommend a bicycle for commuting in a hilly town.
    Outline a lesson on fractions for the fourth grade.
    fatal: not a git repository (or any of the parent directories): .git
    Rain is expected in the west, with winds of up to forty knots.
    """.splitlines()
    if line.strip()
)
LONG_CHARS = 10_000  # about 2,000 tokens
_REPEATS = 200


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    description = "How well the keywords of a task profile tell tasks, on prompts that taught none of them."
    parser = CommandParser(prog="python -m train.classifier", description=description)
    add = parser.add_argument
    add("--profile", type=Path, metavar="FILE", default=demo_model() / "task_profile.json")
    add("--prompts", type=Path, metavar="FILE", help="JSONL of task and prompt or messages, instead of drawn prompts")
    add("--per-task", type=int, default=500, help="prompts to draw per task")
    add("--seed", type=int, default=0, help="of the drawn prompts")
    add("--learn", type=int, default=0, metavar="N", help="first learn keywords from N drawn training prompts per task")
    add("--json", type=Path, metavar="FILE", help="write the numbers here")
    options = parser.parse_args(argv)
    for name, low, high in (("per_task", 1, 10**6), ("seed", 0, 2**31 - 1), ("learn", 0, 10**5)):
        value = getattr(options, name)
        if not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be between {low} and {high}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    try:
        profile = TaskProfile.load(options.profile)
        if options.learn:
            profile = with_demo_keywords(profile, TASKS, options.seed, options.learn)
            profile.save(options.profile)
        classifier = TaskClassifier(profile)
        if not classifier.tasks:
            raise ConfigError(f"{options.profile} holds no keywords; learn them with --learn or python -m train.traces")
        numbers = evaluate(classifier, _prompts(options))
        print_table(numbers, Console())
        if options.json is not None:
            options.json.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    except (EmoeError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _prompts(options: argparse.Namespace) -> dict[str, list[str]]:
    if options.prompts is None:
        return {task: demo_prompts(task, "test", options.seed, options.per_task) for task in TASKS}
    prompts = labelled.read(options.prompts)
    return {task: [p.text for p in prompts if p.task == task] for task in labelled.tasks_of(prompts)}


def evaluate(classifier: TaskClassifier, prompts: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Accuracy by task and over all, the share of unrelated texts it abstains on, and the time of a long text."""
    tasks: dict[str, Any] = {}
    for task, texts in prompts.items():
        found = Counter(classifier.classify(text) for text in texts)
        tasks[task] = {"prompts": len(texts), "accuracy": found[task] / len(texts), "found": dict(found)}
    taken = {text: found for text in UNRELATED if (found := classifier.classify(text)) != OTHER}
    return {
        "accuracy": sum(row["found"].get(task, 0) for task, row in tasks.items())
        / sum(row["prompts"] for row in tasks.values()),
        "tasks": tasks,
        "unrelated": {"texts": len(UNRELATED), "abstained": 1 - len(taken) / len(UNRELATED), "taken": taken},
        "milliseconds": dataclasses.asdict(time_long_text(classifier, prompts)),
    }


@dataclasses.dataclass(frozen=True)
class Milliseconds:
    """Of one text of `LONG_CHARS`: a busy machine moves the median, the least is what the work takes."""

    least: float
    median: float


def time_long_text(classifier: TaskClassifier, prompts: Mapping[str, Sequence[str]]) -> Milliseconds:
    """A text of about 2,000 tokens made of the prompts, all tasks' in turn."""
    parts = [text for same_place in zip(*prompts.values(), strict=False) for text in same_place]
    text = "\n".join(parts)
    text = (text * -(-LONG_CHARS // max(1, len(text))))[:LONG_CHARS]
    taken = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        classifier.classify(text)
        taken.append((time.perf_counter() - began) * 1e3)
    return Milliseconds(min(taken), sorted(taken)[len(taken) // 2])


def print_table(numbers: dict[str, Any], console: Console) -> None:
    """A row per task: how many of its prompts were told right, and what the others were taken for."""
    table = Table(title="tasks told by keywords, on prompts worded as none that taught them")
    for column, justify in (("task", "left"), ("prompts", "right"), ("right", "right"), ("taken for", "left")):
        table.add_column(column, justify=justify)  # pyright: ignore[reportArgumentType]
    for task, row in numbers["tasks"].items():
        wrong = ", ".join(f"{found} {n}" for found, n in sorted(row["found"].items()) if found != task)
        table.add_row(task, str(row["prompts"]), f"{row['accuracy']:.1%}", wrong)
    table.add_row("all", str(sum(row["prompts"] for row in numbers["tasks"].values())), f"{numbers['accuracy']:.1%}")
    console.print(table)
    unrelated, milliseconds = numbers["unrelated"], numbers["milliseconds"]
    console.print(
        f"abstains on {unrelated['abstained']:.0%} of {unrelated['texts']} unrelated texts; a text of about 2,000 "
        f"tokens takes {milliseconds['least']:.2f} ms at best, {milliseconds['median']:.2f} ms in the median"
    )


if __name__ == "__main__":
    sys.exit(main())
