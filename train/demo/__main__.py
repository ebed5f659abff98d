"""`python -m train.demo`: make the demo model's tokenizer, train the model, write its checkpoint, measure it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from tokenizers import Tokenizer

from emoe_jax.errors import EmoeError, one_line, require
from train.demo import evaluate, export, report, shape, tokenizer
from train.demo.batches import Encoder
from train.demo.objective import Metrics
from train.demo.trainer import Checkpoints, Hyperparameters, run
from train.progress import RunHistory, progress_bar, read_history
from train.ranges import CommandParser, check_ranges
from train.tasks import texts

STEPS = 4600
_LOG_EVERY = 50


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(prog="python -m train.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("checkpoints/demo"), help="where the finished checkpoint goes")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/demo"),
        help="training checkpoints and history; a killed run resumes from here",
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps; they fix the learning rate schedule")
    parser.add_argument("--seed", type=int, default=0, help="of the data, the initial weights and the test examples")
    parser.add_argument("--rows", type=int, default=Hyperparameters.rows, help="sequences per step, a multiple of 4")
    parser.add_argument("--length", type=int, default=Hyperparameters.length, help="tokens per sequence, at most 256")
    parser.add_argument(
        "--expert-dropout",
        type=float,
        default=Hyperparameters.expert_dropout,
        help="share of rows that get by with part of the experts (the shipped model: 0)",
    )
    parser.add_argument(
        "--concentration",
        type=float,
        default=Hyperparameters.concentration,
        help="weight of the loss that draws a kind of text to few experts (the shipped model: 0)",
    )
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--eval-only", action="store_true", help="measure the checkpoint in --out, train nothing")
    parser.add_argument("--eval-examples", type=int, default=500, help="test examples per task")
    parser.add_argument(
        "--eval-generated", type=int, default=64, help="how many of them SUM and CONV answer for ROUGE-L"
    )
    options = parser.parse_args(argv)
    ranges = {
        "steps": (1, 10**7),
        "seed": (0, 2**31 - 1),
        "rows": (4, 4096),
        "length": (64, 256),
        "expert_dropout": (0, 1),
        "concentration": (0, 10),
        "eval_examples": (1, 10**6),
    }
    check_ranges(parser, options, ranges)
    if options.rows % 4:
        parser.error(f"--rows is {options.rows}; it must be a multiple of 4")
    if not 1 <= options.eval_generated <= options.eval_examples:
        parser.error(f"--eval-generated is {options.eval_generated}; it must be between 1 and --eval-examples")
    if options.eval_only and not (options.out / "config.json").exists():
        parser.error(f"--eval-only: {options.out} holds no checkpoint (config.json is missing)")
    return options


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    console = Console()
    try:
        if not options.eval_only:
            _train(options, console)
        config, parameters, bpe = export.read(options.out)
        console.print(f"measuring {options.out} on {options.eval_examples} test examples per task")
        numbers = evaluate.evaluate(
            parameters, config, Encoder(bpe), options.seed, options.eval_examples, options.eval_generated
        )
    except (EmoeError, ImportError, OSError) as error:
        _fail(one_line(error))
    report.print_table(numbers, console)
    if options.json:
        report.write_json(numbers, options.json)


def _train(options: argparse.Namespace, console: Console) -> None:
    require("matplotlib")
    plan = Hyperparameters(
        options.steps,
        options.seed,
        options.rows,
        options.length,
        loss_positions=options.rows * options.length * 9 // 16,
        expert_dropout=options.expert_dropout,
        concentration=options.concentration,
    )
    work: Path = options.work
    _claim(work, plan)
    bpe = _tokenizer(work, plan, console)
    checkpoints = Checkpoints(work / "checkpoints")
    first = max(checkpoints.steps(), default=0)
    history = RunHistory(work / "history.jsonl", first)
    began = time.monotonic()
    with progress_bar(console, "step") as progress:
        bar = progress.add_task("compiling", total=plan.steps, completed=first)

        def show(step: int, metrics: Metrics) -> None:
            history.add({"step": step} | {name: round(float(value), 5) for name, value in metrics._asdict().items()})
            text = f"loss {metrics.loss:.3f}  answers {metrics.answer_accuracy:.1%}  facts {metrics.fact_accuracy:.1%}"
            progress.update(bar, completed=step, description=text)
            if not console.is_terminal and step % _LOG_EVERY == 0:
                console.print(
                    f"step {step}/{plan.steps}  {text}  text {metrics.text_loss:.2f}  balance {metrics.balance:.2f}"
                    f"  dropped {metrics.dropped:.1%}"
                    f"  {time.monotonic() - began:.0f} s"
                )

        state = run(shape.model_config(), plan, bpe, checkpoints, show)
    history.close()
    export.write(options.out, shape.hf_config(), state.parameters, bpe)
    report.plot_loss(read_history(history.path), options.out / "loss.png")
    console.print(f"wrote {options.out} ({_megabytes(options.out):.1f} MB)")


def _claim(work: Path, plan: Hyperparameters) -> None:
    """Mark the directory as this plan's on these texts; refuse one that holds a run of another plan or other texts."""
    work.mkdir(parents=True, exist_ok=True)
    (work / ".gitignore").write_text("*\n")
    path = work / "plan.json"
    described = json.dumps(dataclasses.asdict(plan) | {"texts": texts.fingerprint()})
    if path.exists() and path.read_text() != described:
        _fail(
            f"{work} holds a run of another plan or on other texts, {path.read_text()}; this is {described}; "
            "choose another --work or remove it"
        )
    path.write_text(described)


def _tokenizer(work: Path, plan: Hyperparameters, console: Console) -> Tokenizer:
    """The run's tokenizer, trained once."""
    path = work / "tokenizer.json"
    if not path.exists():
        console.print("training the tokenizer")
        tokenizer.save(tokenizer.train(plan.seed, shape.VOCAB_SIZE), work, shape.MAX_LENGTH)
    return Tokenizer.from_file(str(path))


def _megabytes(directory: Path) -> float:
    return sum(path.stat().st_size for path in directory.iterdir() if path.is_file()) / 1e6


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
