"""`emoe traces convert FILE OUT`: write a trace anew: compressed, without arrays of others, and in part if asked."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from emoe_jax.errors import ConfigError
from emoe_jax.option_fields import Options, option
from emoe_jax.traces import RoutingTrace
from serve.exits import OK, status_of
from serve.flags import Parser, flag_names, parser_of, read_values
from serve.recording import check_trace_file

COMMAND = "python -m serve.command.traces.convert"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertOptions(Options):
    """What `emoe traces convert` is told, beside the files."""

    prompts: int | None = option(None, "prompts to keep", low=1, metavar="N", default_text="all")
    skip: int = option(0, "prompts to leave out before them, in order of arrival", low=0, metavar="N")
    tasks: list[str] = option([], "tasks whose prompts are kept", metavar="TASK", default_text="all")
    prompt_tokens: bool = option(True, "whether to keep what clients wrote, as token ids, where the trace has it")
    prompt_embedding: bool = option(True, "whether to keep the mean embeddings of prompts, where the trace has them")
    json: bool = option(False, "whether to print JSON instead of a line")


def parser(command: str = COMMAND) -> Parser:
    """The command line."""
    description = "Write a routing trace anew: compressed, with the arrays of the format only, and in part if asked."
    made = parser_of(ConvertOptions, command, description, {ConvertOptions: "convert"})
    made.add_argument("trace", metavar="FILE", help="routing trace (.npz)")
    made.add_argument("out", metavar="OUT", help="the new trace, which must not exist yet")
    return made


def main(arguments: Sequence[str] | None = None, command: str = COMMAND) -> int:
    """Write the new trace; the exit status."""
    given = read_values(parser(command), ConvertOptions, sys.argv[1:] if arguments is None else arguments)
    source, out = given.pop("trace"), Path(given.pop("out"))
    return status_of(lambda: _run(source, out, ConvertOptions(**given)), lambda text: flag_names(text, ConvertOptions))


def _run(source: str, out: Path, options: ConvertOptions) -> int:
    try:
        check_trace_file(out)
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix("record_traces: ")) from None
    trace = part_of(RoutingTrace.load(source), options)
    draft = out.with_name(f"{out.name}.draft")
    try:
        trace.save(draft)
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)
    numbers = {
        "trace": str(out),
        "prompts": trace.num_prompts,
        "tokens": trace.num_tokens,
        "bytes": out.stat().st_size,
    }
    if options.json:
        print(json.dumps(numbers, indent=1))
    else:
        print(f"{out}: {trace.num_prompts:,} prompts, {trace.num_tokens:,} tokens, {numbers['bytes']:,} bytes")
    return OK


def part_of(trace: RoutingTrace, options: ConvertOptions) -> RoutingTrace:
    """What the options keep of a trace. Raises `ConfigError` where that is nothing, or a task is not there."""
    for task in options.tasks:
        if task not in trace.task_names:
            raise ConfigError(f"the trace has no task {task[:40]!r}; it has {', '.join(trace.task_names)}")
    kept = [
        number for number, task in enumerate(trace.tasks) if not options.tasks or task in options.tasks
    ]  # in order of arrival
    kept = kept[options.skip :][: options.prompts]
    if not kept:
        raise ConfigError(f"nothing is left of {trace.num_prompts} prompts; keep some")
    part = trace.select(kept) if len(kept) < trace.num_prompts else trace
    if not options.prompt_tokens:
        part = dataclasses.replace(part, prompt_tokens=None)
    return part if options.prompt_embedding else part.without_embedding()


if __name__ == "__main__":
    sys.exit(main())
