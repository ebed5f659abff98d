"""`emoe predictor evaluate MODEL --traces FILE`: judge the predictor of a model on later traffic."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from emoe_jax.option_fields import Options, option
from serve.command.predictor.own_model import check_trace, directory_of, predictor_of
from serve.exits import OK, status_of
from serve.flags import Parser, flag_names, parser_of, read_values

COMMAND = "python -m serve.command.predictor.evaluate"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions(Options):
    """What `emoe predictor evaluate` is told, beside the model."""

    traces: str | None = option(None, "routing trace of traffic that the predictor was not trained on", metavar="FILE")
    updates: bool = option(True, "whether it learns from the prompts of the trace as it goes, as the server's does")
    json: bool = option(False, "whether to print JSON instead of a table")


def parser(command: str = COMMAND) -> Parser:
    """The command line."""
    description = "Compare the predictor in a model's directory with simple baselines, on recorded traffic."
    made = parser_of(EvaluateOptions, command, description, {EvaluateOptions: "evaluate"})
    made.add_argument("model", metavar="MODEL", help="directory of the checkpoint")
    return made


def main(arguments: Sequence[str] | None = None, command: str = COMMAND) -> int:
    """Print how good the predictor is on a trace; the exit status."""
    made = parser(command)
    given = read_values(made, EvaluateOptions, sys.argv[1:] if arguments is None else arguments)
    model = given.pop("model")
    if given.get("traces") is None:
        made.error("--traces is missing; expected a routing trace of this model")
    return status_of(lambda: _run(model, EvaluateOptions(**given)), lambda text: flag_names(text, EvaluateOptions))


def _run(model: str, options: EvaluateOptions) -> int:
    from train.predictor import __main__ as trainer  # takes seconds to import
    from train.predictor import report
    from train.predictor.options import arguments

    directory = directory_of(model)
    assert options.traces is not None
    check_trace(Path(options.traces), directory)
    words = ["--traces", options.traces, "--evaluate", str(predictor_of(directory))]
    numbers = trainer.judge(arguments(words if options.updates else [*words, "--no-updates"]))
    if options.json:
        print(json.dumps(numbers, indent=1))
    else:
        report.print_evaluation(numbers, Console(width=None if sys.stdout.isatty() else 160))
    return OK


if __name__ == "__main__":
    sys.exit(main())
