"""`emoe predictor train MODEL --traces FILE`: from recorded traffic to the predictor that `emoe serve` finds."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from emoe_jax.errors import ConfigError
from emoe_jax.models import config_from_directory
from emoe_jax.option_fields import Options, option
from emoe_jax.predictor import PredictorError
from emoe_jax.residency.knowledge import RoutingKnowledge
from serve.command.predictor.own_model import check_trace, directory_of, predictor_of
from serve.exits import OK, status_of
from serve.flags import Parser, flag_names, parser_of, read_values

COMMAND = "python -m serve.command.predictor.train"
DRAFT = "predictor.training"
"""Beside the predictor, while it is being trained. A killed run goes on from there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions(Options):
    """What `emoe predictor train` is told, beside the model."""

    traces: str | None = option(
        None,
        "routing trace of a server (--record-traces FILE --record-prompt-tokens) or of `emoe traces record`",
        metavar="FILE",
    )
    steps: int = option(300, "optimizer steps", low=1, high=10**7, metavar="N")
    seed: int = option(0, "of weights, batches and the held-out prompts", low=0, high=2**31 - 1, metavar="N")
    held_out: float = option(
        0.12, "share of the prompts that the best step is chosen by", low=0.02, high=0.5, metavar="SHARE"
    )
    json: bool = option(False, "whether to print the numbers as JSON instead of a table")


def parser(command: str = COMMAND) -> Parser:
    """The command line."""
    description = (
        "Learn from recorded traffic which experts a prompt will use. The predictor is put into the model's directory, "
        "where the server finds it at its next start. A killed run goes on when it is started again."
    )
    made = parser_of(TrainOptions, command, description, {TrainOptions: "train"})
    made.add_argument("model", metavar="MODEL", help="directory of the checkpoint")
    return made


def main(arguments: Sequence[str] | None = None, command: str = COMMAND) -> int:
    """Train, put the predictor in its place, and print how good it is; the exit status."""
    made = parser(command)
    given = read_values(made, TrainOptions, sys.argv[1:] if arguments is None else arguments)
    model = given.pop("model")
    if given.get("traces") is None:
        made.error("--traces is missing; expected a routing trace of this model")
    return status_of(lambda: _run(model, TrainOptions(**given)), lambda text: flag_names(text, TrainOptions))


def _run(model: str, options: TrainOptions) -> int:
    directory = directory_of(model)
    assert options.traces is not None
    check_trace(Path(options.traces), directory)
    numbers = train(directory, options, Console(stderr=options.json, width=None if sys.stdout.isatty() else 160))
    if options.json:
        print(json.dumps(numbers, indent=1))
    return OK


def train(directory: Path, options: TrainOptions, console: Console) -> dict[str, Any]:
    """The numbers of the predictor that is in the model's directory now.

    It replaces an earlier one when it is whole and has been read as the server reads it.
    """
    from train.predictor import __main__ as trainer  # takes seconds to import
    from train.predictor import report
    from train.predictor.options import arguments

    draft, place = directory / DRAFT, predictor_of(directory)
    words = ["--traces", str(options.traces), "--out", str(draft), "--steps", str(options.steps)]
    given = arguments([*words, "--seed", str(options.seed), "--held-out", str(options.held_out)])
    try:
        numbers = trainer.train(given, console)
    except PredictorError as error:
        if str(draft / "run.json") not in str(error):
            raise
        raise ConfigError(
            f"{draft} holds an unfinished run on another trace or with other options; remove it to begin anew"
        ) from None
    report.print_evaluation(numbers, console)
    RoutingKnowledge.load(directory, config_from_directory(directory, quiet=True), None, draft)
    shutil.rmtree(draft / "checkpoints", ignore_errors=True)
    replaced = place.exists()
    if replaced:
        shutil.rmtree(place)
    draft.rename(place)
    console.print(
        f"{'replaced' if replaced else 'wrote'} {place}; `emoe serve {directory}` finds it at its next start",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return {"predictor": str(place), **numbers}


if __name__ == "__main__":
    sys.exit(main())
