"""`emoe bench latency MODEL`: how long a batch of requests takes that has the engine to itself."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.bench.in_process import ABOUT, answer_all, described, loaded, random_prompts, show
from benchmarks.serving.report import summary
from emoe_jax.demo import demo_model
from emoe_jax.engine_config import EngineConfig
from emoe_jax.option_fields import option
from serve.exits import OK, status_of
from serve.flags import Parser, flag_names, parser_of, read_values

COMMAND = "python -m benchmarks.bench.latency"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatencyOptions(EngineConfig):
    """What `emoe bench latency` is told, beside the model: the options of its engine, and its own."""

    input_len: int = option(128, "tokens of a prompt, drawn at random", low=1, metavar="TOKENS")
    output_len: int = option(128, "tokens of an answer", low=1, metavar="TOKENS")
    batch_size: int = option(1, "requests that come together", low=1, high=4096, metavar="N")
    num_iters: int = option(10, "batches that are timed", low=1, metavar="N")
    num_iters_warmup: int = option(2, "batches before them that are not timed", low=0, metavar="N")
    json: bool = option(False, "whether to print JSON instead of a table")


def parser(command: str = COMMAND) -> Parser:
    """The command line."""
    description = "Time batches of random prompts that have an engine to themselves, in this process."
    made = parser_of(LatencyOptions, command, description, {EngineConfig: "engine", LatencyOptions: "latency"})
    made.add_argument("model", nargs="?", default=str(demo_model()), metavar="MODEL", help="directory or hub id")
    return made


def main(arguments: Sequence[str] | None = None, command: str = COMMAND) -> int:
    """Measure, and print the times; the exit status."""
    given = read_values(parser(command), LatencyOptions, sys.argv[1:] if arguments is None else arguments)
    model = given.pop("model")
    return status_of(lambda: _run(model, LatencyOptions(**given)), lambda text: flag_names(text, LatencyOptions))


def _run(model: str, options: LatencyOptions) -> int:
    numbers = measure(model, options)
    if options.json:
        print(json.dumps(numbers, indent=1))
    else:
        batch = f"{options.batch_size:,} x ({options.input_len:,} + {options.output_len:,}) tokens"
        show(numbers, f"latency of {numbers['model']}: {batch}", (*ROWS, *ABOUT))
    return OK


ROWS = (
    ("until the last token, median", "p50_latency_s", "{} s"),
    ("until the last token, 99 %", "p99_latency_s", "{} s"),
    ("until the first token, median", "p50_ttft_s", "{} s"),
    ("until the first token, 99 %", "p99_ttft_s", "{} s"),
    ("per further token, median", "p50_tpot_s", "{} s"),
    ("per further token, 99 %", "p99_tpot_s", "{} s"),
)


def measure(model: str, options: LatencyOptions) -> dict[str, Any]:
    """Percentiles over all requests of all timed batches, in seconds."""
    total = options.num_iters_warmup + options.num_iters
    with loaded(model, options, options.batch_size) as engine:
        sizes = options.input_len, options.output_len
        prompts = random_prompts(engine, total * options.batch_size, *sizes, options.seed)
        batches = [prompts[number * options.batch_size :][: options.batch_size] for number in range(total)]
        records = [answer_all(engine, batch, options.output_len) for batch in batches]
        timed = [record for batch in records[options.num_iters_warmup :] for record in batch]
        found = summary(timed)
        keys = (f"p{percentile}_{name}_s" for name in ("latency", "ttft", "tpot", "itl") for percentile in (50, 90, 99))
        return {
            **described(engine, model),
            "input_len": options.input_len,
            "output_len": options.output_len,
            "batch_size": options.batch_size,
            "iterations": options.num_iters,
            "mean_latency_s": found["mean_latency_s"],
            **{key: found[key] for key in keys},
        }


if __name__ == "__main__":
    sys.exit(main())
