"""`emoe bench throughput MODEL`: how many requests and tokens an engine computes per second when it never waits."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.bench.in_process import ABOUT, answer_all, described, loaded, random_prompts, show
from emoe_jax.demo import demo_model
from emoe_jax.engine_config import EngineConfig
from emoe_jax.option_fields import option
from serve.exits import OK, status_of
from serve.flags import Parser, flag_names, parser_of, read_values

COMMAND = "python -m benchmarks.bench.throughput"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThroughputOptions(EngineConfig):
    """What `emoe bench throughput` is told, beside the model: the options of its engine, and its own."""

    num_prompts: int = option(100, "requests, all of which are there from the start", low=1, metavar="N")
    input_len: int = option(128, "tokens of a prompt, drawn at random", low=1, metavar="TOKENS")
    output_len: int = option(128, "tokens of an answer", low=1, metavar="TOKENS")
    json: bool = option(False, "whether to print JSON instead of a table")


def parser(command: str = COMMAND) -> Parser:
    """The command line."""
    description = "Compute the answers to random prompts that are all there from the start, in this process."
    made = parser_of(ThroughputOptions, command, description, {EngineConfig: "engine", ThroughputOptions: "throughput"})
    made.add_argument("model", nargs="?", default=str(demo_model()), metavar="MODEL", help="directory or hub id")
    return made


def main(arguments: Sequence[str] | None = None, command: str = COMMAND) -> int:
    """Measure, and print the rates; the exit status."""
    given = read_values(parser(command), ThroughputOptions, sys.argv[1:] if arguments is None else arguments)
    model = given.pop("model")
    return status_of(lambda: _run(model, ThroughputOptions(**given)), lambda text: flag_names(text, ThroughputOptions))


def _run(model: str, options: ThroughputOptions) -> int:
    numbers = measure(model, options)
    if options.json:
        print(json.dumps(numbers, indent=1))
    else:
        load = f"{options.num_prompts:,} x ({options.input_len:,} + {options.output_len:,}) tokens"
        show(numbers, f"throughput of {numbers['model']}: {load}", (*ROWS, *ABOUT))
    return OK


ROWS = (
    ("requests per second", "requests_per_s", "{}"),
    ("tokens of answers per second", "output_tokens_per_s", "{}"),
    ("tokens per second, prompts included", "total_tokens_per_s", "{}"),
    ("sequences of a step, at most", "max_num_seqs", "{}"),
    ("time", "seconds", "{} s"),
)


def measure(model: str, options: ThroughputOptions) -> dict[str, Any]:
    """Rates over the time from the first request to the last token."""
    with loaded(model, options, options.num_prompts) as engine:
        sizes = options.input_len, options.output_len
        warmup, *prompts = random_prompts(engine, options.num_prompts + 1, *sizes, options.seed)
        answer_all(engine, [warmup], options.output_len)
        records = answer_all(engine, prompts, options.output_len)
        seconds = max(record.end for record in records)
        answered = sum(len(record.token_times) for record in records)
        return {
            **described(engine, model),
            "num_prompts": options.num_prompts,
            "input_len": options.input_len,
            "output_len": options.output_len,
            "max_num_seqs": engine.options.max_num_seqs,
            "seconds": seconds,
            "requests_per_s": len(records) / seconds,
            "output_tokens_per_s": answered / seconds,
            "total_tokens_per_s": (answered + len(records) * options.input_len) / seconds,
        }


if __name__ == "__main__":
    sys.exit(main())
