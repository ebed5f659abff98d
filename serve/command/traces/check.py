"""`emoe traces check FILE...`: whether files are routing traces, and of one model."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from emoe_jax.option_fields import Options, option
from emoe_jax.planning.catalogue import find_model
from emoe_jax.traces import RoutingTrace, TraceError
from serve.exits import NO, OK, status_of
from serve.flags import Parser, parser_of, read_values

COMMAND = "python -m serve.command.traces.check"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckOptions(Options):
    """What `emoe traces check` is told, beside the traces."""

    model: str | None = option(
        None,
        "model whose routing they have to be: a directory, a config.json, a known model or a hub id",
        metavar="MODEL",
        default_text="any",
    )
    json: bool = option(False, "whether to print JSON instead of lines")


def parser(command: str = COMMAND) -> Parser:
    """The command line."""
    description = "Read routing traces as the trainer and the benchmarks do. The exit status is 1 where one is none."
    made = parser_of(CheckOptions, command, description, {CheckOptions: "check"})
    made.add_argument("traces", nargs="+", metavar="FILE", help="routing trace (.npz)")
    return made


def main(arguments: Sequence[str] | None = None, command: str = COMMAND) -> int:
    """Say of each file whether it is a trace; the exit status."""
    given = read_values(parser(command), CheckOptions, sys.argv[1:] if arguments is None else arguments)
    paths = given.pop("traces")
    return status_of(lambda: _run(paths, CheckOptions(**given)))


def _run(paths: Sequence[str], options: CheckOptions) -> int:
    config = None if options.model is None else find_model(options.model)[1]
    wanted = None if config is None else (len(config.moe_layers), config.num_experts, config.top_k)
    found = [_checked(path, wanted) for path in paths]
    if options.json:
        print(json.dumps({"traces": found}, indent=1))
    else:
        for one in found:
            print(f"{'ok     ' if one['ok'] else 'problem'} {one['trace']}: {one['found']}")
    return OK if all(one["ok"] for one in found) else NO


def _checked(path: str, wanted: tuple[int, int, int] | None) -> dict[str, Any]:
    try:
        trace = RoutingTrace.load(path)
        if wanted is not None:
            trace.check_model(*wanted, "the model")
    except TraceError as error:
        return {"trace": path, "ok": False, "found": str(error).removeprefix(f"{path}: ")}
    ranks = "" if trace.ranks == trace.top_k else f", {trace.ranks} ranks"
    found = f"{trace.describe()}{ranks}; {trace.num_prompts:,} prompts, {trace.num_tokens:,} tokens"
    return {"trace": path, "ok": True, "found": found}


if __name__ == "__main__":
    sys.exit(main())
