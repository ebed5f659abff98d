"""`python -m train.traces`: run prompts of each task through an engine, record their routing, profile the tasks."""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from emoe_jax import EmoeError, Engine, SamplingParams
from emoe_jax.demo import demo_model
from emoe_jax.errors import ConfigError, one_line
from emoe_jax.requests.request import RequestOutput
from emoe_jax.tasks import Lengths, TaskProfile
from emoe_jax.traces import RoutingTrace
from emoe_jax.traces.parts import parts_of
from emoe_jax.traces.recorder import recover
from train import prompts as labelled
from train.keywords import with_demo_keywords, with_keywords
from train.progress import progress_bar
from train.prompts import Prompt, stretch
from train.ranges import CommandParser, check_ranges
from train.tasks import MORE, TASKS, texts, unrelated

COMMAND = "python -m train.traces"
STDOUT = Path("-")


def parser(command: str = COMMAND) -> argparse.ArgumentParser:
    """The command line. `command` is how it was called, for the help text."""
    parser = CommandParser(prog=command, description=(__doc__ or "").partition(": ")[2])
    add = parser.add_argument
    add("--model", default=str(demo_model()), help="checkpoint directory or hub id (the bundled demo model)")
    add("--prompts", type=Path, metavar="FILE", help="JSONL of task and prompt or messages, instead of drawn prompts")
    add(
        "--tasks",
        nargs="+",
        choices=(*TASKS, *MORE, *texts.KINDS),
        default=list(TASKS),
        help="tasks to draw prompts of; facts are questions of qa whose answer is not in the prompt, and "
        f"{', '.join(texts.KINDS)} are texts that are read token by token",
    )
    add("--per-task", type=int, default=200, help="prompts per task")
    add("--split", choices=("train", "test"), default="train", help="which phrases and names prompts may use")
    add("--seed", type=int, default=0, help="of the prompts and their order")
    add("--max-tokens", type=int, default=96, help="longest answer")
    add("--temperature", type=float, default=0.0, help="0 answers greedily")
    add("--max-num-seqs", type=int, default=16, help="sequences computed together")
    add("--out", type=Path, metavar="FILE.npz", help="the trace")
    add(
        "--trace-ranks",
        type=int,
        metavar="N",
        help="experts of each token and layer that it holds, the best first (default: those that the router chooses)",
    )
    add("--profile", type=Path, metavar="FILE", help="task profile to make, or to update where it exists")
    add(
        "--keyword-prompts",
        type=int,
        default=600,
        help="prompts per task to draw and learn keywords from (with --prompts, the file's); 0 leaves keywords",
    )
    add(
        "--json",
        type=Path,
        nargs="?",
        const=STDOUT,
        metavar="FILE",
        help="write the numbers here; without a file print them in place of the table",
    )
    add("--recover", type=Path, metavar="FILE.npz", help="only finish the trace of a run that was killed")
    return parser


def arguments(argv: Sequence[str] | None, command: str = COMMAND) -> argparse.Namespace:
    made = parser(command)
    options = made.parse_args(argv)
    ranges = {
        "per_task": (1, 10**6),
        "seed": (0, 2**31 - 1),
        "max_tokens": (1, 10**6),
        "temperature": (0, 100),
        "max_num_seqs": (1, 1024),
        "keyword_prompts": (0, 10**5),
    }
    check_ranges(made, options, ranges)
    if (options.out is None) == (options.recover is None):
        made.error("give either --out or --recover")
    options.tasks = list(dict.fromkeys(options.tasks))
    if options.profile is not None and not _texts(options).isdisjoint(options.tasks):
        made.error("--profile is of prompts; leave texts out of --tasks")
    return options


def main(argv: Sequence[str] | None = None, command: str = COMMAND) -> int:
    options = arguments(argv, command)
    prints = options.json == STDOUT
    console = Console(stderr=prints)
    try:
        if options.recover is not None:
            console.print(f"{options.recover}: {recover(options.recover)} tokens")
            return 0
        numbers = record(options, console)
    except (EmoeError, ImportError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    if prints:
        print(json.dumps(numbers, indent=2))
        return 0
    print_table(numbers, console)
    if options.json is not None:
        options.json.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    return 0


def record(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Record the trace, update the profile if there is to be one, and return the numbers of both."""
    for file in (options.out, options.profile, options.json):
        if file is not None and not file.parent.is_dir():
            raise ConfigError(f"{file}: the folder {file.parent} does not exist")
    if parts_of(options.out).exists():
        raise ConfigError(
            f"{options.out} was left unfinished; finish it with --recover, or remove {parts_of(options.out)}"
        )
    with Engine.load(
        options.model,
        expert_memory="100%",
        task_profile=None,
        predictor=None,  # one that this version cannot read must not keep its successor from being trained
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=max(512, options.max_num_seqs),
        trace_ranks=options.trace_ranks,
    ) as engine:
        path: Path | None = options.profile
        profile = None if path is None else _open_profile(path, engine)
        prompts = _prompts(options)
        asked = [*_asked(prompts, options, engine), *_read(options, engine)]
        if options.prompts is None:
            random.Random(options.seed).shuffle(asked)
        engine.record_traces(options.out, prompt_tokens=True)
        outputs = _answers(engine, asked, options, console)
    trace = RoutingTrace.load(options.out)
    numbers = {"model": engine.model_name, "trace": str(options.out), "tokens": trace.num_tokens}
    by_task = {
        task: [output for output in outputs if output.task == task] for task in sorted({one.task for one in asked})
    }
    numbers["tasks"] = {task: _numbers(task, some, trace) for task, some in by_task.items()}
    if profile is not None and path is not None:
        numbers["profile"] = str(path)
        profile = _with_answers(profile, by_task, trace)
        if options.keyword_prompts:
            profile = _with_keywords(profile, prompts, options)
        profile.save(path)
    return numbers


def _open_profile(path: Path, engine: Engine) -> TaskProfile:
    if not path.exists():
        return TaskProfile.empty(engine.config)
    profile = TaskProfile.load(path)
    profile.check(engine.config)
    return profile


class _Asked(NamedTuple):
    task: str
    token_ids: list[int]
    params: SamplingParams


def _texts(options: argparse.Namespace) -> set[str]:
    return set() if options.prompts is not None else set(options.tasks).intersection(texts.KINDS)


def _prompts(options: argparse.Namespace) -> list[Prompt]:
    """The file's prompts, or drawn ones of each task."""
    if options.prompts is not None:
        return labelled.read(options.prompts)
    tasks = [task for task in options.tasks if task not in texts.KINDS]
    return labelled.drawn(tasks, options.split, options.seed, options.per_task)


def _asked(prompts: list[Prompt], options: argparse.Namespace, engine: Engine) -> list[_Asked]:
    """Prompts that are to be answered."""
    if engine.tokenizer is None:
        raise ConfigError(f"{options.model} has no tokenizer, so prompts in words cannot be run")
    params = SamplingParams(max_tokens=options.max_tokens, temperature=options.temperature, seed=options.seed)
    asked = [_Asked(prompt.task, prompt.token_ids(engine.tokenizer), params) for prompt in prompts]
    for task, token_ids, _ in asked:
        if len(token_ids) + options.max_tokens > engine.max_model_len:
            raise ConfigError(
                f"a prompt of {task} has {len(token_ids)} tokens; with --max-tokens {options.max_tokens} that "
                f"exceeds the model's {engine.max_model_len}"
            )
    return asked


def _read(options: argparse.Namespace, engine: Engine) -> list[_Asked]:
    """Texts: the first token is the prompt, and the others are forced to follow it."""
    asked = []
    for kind in sorted(_texts(options)):
        for number in range(options.per_task):
            assert engine.tokenizer is not None
            try:
                ids = stretch(engine.tokenizer, engine.config, kind, options.split, f"{options.seed}/{number}")
            except ImportError as error:
                raise ConfigError(f"texts of the kind {kind}: {error}") from None
            asked.append(_Asked(kind, ids[:1], SamplingParams(forced_token_ids=tuple(ids[1:]))))
    return asked


def _answers(engine: Engine, asked: list[_Asked], options: argparse.Namespace, console: Console) -> list[RequestOutput]:
    """Run everything, as much at a time as the engine computes together."""
    outputs: list[RequestOutput] = []
    waiting, tokens = list(reversed(list(enumerate(asked)))), 0
    running = 0
    with progress_bar(console, "prompts") as progress:
        bar = progress.add_task("compiling", total=len(asked))
        while len(outputs) < len(asked):
            while waiting and running < 2 * options.max_num_seqs:  # a queue, so that every step is full
                number, (task, token_ids, params) = waiting.pop()
                engine.add_request(str(number), token_ids, params, task=task)
                running += 1
            for delta in engine.step():
                tokens += len(delta.token_ids)
                if delta.finish_reason is not None:
                    outputs.append(engine.pop(delta.request_id))
                    running -= 1
            progress.update(bar, completed=len(outputs), description=f"{tokens} answer tokens")
    return outputs


def _numbers(task: str, outputs: list[RequestOutput], trace: RoutingTrace) -> dict[str, Any]:
    """What a task's answers and routing are like."""
    lengths = Lengths.of([len(output.token_ids) for output in outputs])
    frequency, tokens = _frequency(task, trace)
    top = np.sort(frequency, axis=1)[:, ::-1][:, : -(-trace.num_experts // 4)].sum(axis=1)
    entropy = -np.sum(frequency * np.log2(np.maximum(frequency, 1e-12)), axis=1)
    return {
        "prompts": len(outputs),
        "prompt_tokens": float(np.mean([len(output.prompt_token_ids) for output in outputs])),
        "output_length": dataclasses.asdict(lengths),
        "tokens": tokens,
        "coverage_of_top_quarter": float(top.mean()),
        "entropy_bits_by_layer": entropy.tolist(),
    }


def _frequency(task: str, trace: RoutingTrace) -> tuple[np.ndarray, int]:
    """Share of each expert `[M, E]` among the choices of a task's tokens, and how many tokens those are."""
    index = trace.task_names.index(task)
    experts = trace.experts[trace.task[trace.sample] == index]
    counts = [np.bincount(experts[:, m].ravel(), minlength=trace.num_experts) for m in range(trace.num_layers)]
    return np.array(counts) / max(1, experts.shape[0] * trace.top_k), len(experts)


def _with_answers(profile: TaskProfile, outputs: dict[str, list[RequestOutput]], trace: RoutingTrace) -> TaskProfile:
    """The profile with this run's answer lengths and mean routing by task."""
    for task, some in outputs.items():
        lengths = [len(output.token_ids) for output in some]
        frequency, tokens = _frequency(task, trace)
        profile = profile.with_task(
            task, output_length=Lengths.of(lengths), routing=frequency, prompts=len(lengths), tokens=tokens
        )
    return profile


def _with_keywords(profile: TaskProfile, prompts: list[Prompt], options: argparse.Namespace) -> TaskProfile:
    """The profile with keywords of the prompts' tasks; those of demo tasks are learned from more prompts than run."""
    if options.prompts is None:
        return with_demo_keywords(profile, options.tasks, options.seed, options.keyword_prompts)
    by_task = {
        task: [prompt.text for prompt in prompts if prompt.task == task][: options.keyword_prompts]
        for task in labelled.tasks_of(prompts)
    }
    return with_keywords(profile, by_task, unrelated.REQUESTS, unrelated.prose())


def print_table(numbers: dict[str, Any], console: Console) -> None:
    """One row per task; `best 25 %` is the share of choices that fall on the task's most frequent experts."""
    table = Table(title=f"{numbers['trace']}: {numbers['tokens']} tokens routed by {numbers['model']}")
    table.add_column("task")
    columns = (
        "prompts",
        "prompt tokens",
        "answer tokens",
        "median",
        "p90",
        "best 25 %",
        "bits",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for task, row in numbers["tasks"].items():
        lengths = row["output_length"]
        quantiles = lengths["quantiles"]
        table.add_row(
            task,
            str(row["prompts"]),
            f"{row['prompt_tokens']:.1f}",
            f"{lengths['mean']:.1f}",
            f"{quantiles[2]:.0f}",
            f"{quantiles[4]:.0f}",
            f"{row['coverage_of_top_quarter']:.1%}",
            f"{np.mean(row['entropy_bits_by_layer']):.2f}",
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
