"""`emoe bench serve URL`: a running server under load, seen by its clients."""

import asyncio
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.bench.arrivals import Process, arrival_times
from emoe_jax.amounts import format_number
from emoe_jax.errors import ConfigError
from emoe_jax.option_fields import Options, option
from emoe_jax.requests.contract import RoutingContract
from serve.command.served_state import between
from serve.exits import INTERRUPTED, NO, OK, status_of
from serve.flags import Parser, flag_names, parser_of, read_values

if TYPE_CHECKING:
    from benchmarks.serving.report import Record

COMMAND = "python -m benchmarks.bench.serve"
URL = "http://127.0.0.1:8000"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions(Options):
    """What `emoe bench serve` is told, beside the URL."""

    num_prompts: int = option(100, "requests", low=1, metavar="N")
    arrivals: Process = option(
        "poisson",
        "when requests come: at random, in bursts (gamma), evenly, or from users who ask again when they are answered",
    )
    request_rate: float | None = option(
        None,
        "requests per second",
        low=0,
        open_low=True,
        metavar="N",
        default_text="all requests come at once",
    )
    burstiness: float = option(
        0.5,
        "of --arrivals gamma: 1 is Poisson, less comes in bursts, more is even",
        low=0,
        high=1000,
        open_low=True,
        metavar="SHAPE",
    )
    max_concurrency: int | None = option(
        None,
        "requests that are sent and not answered, at most; with --arrivals closed the number of users",
        low=1,
        metavar="N",
        default_text="no limit",
    )
    prompts: str | None = option(
        None,
        "prompts: a .txt file with one a line, or JSONL as of `emoe traces record`",
        metavar="FILE",
        default_text="the test prompts of the demo's tasks",
    )
    max_tokens: int = option(128, "tokens of an answer, at most", low=1, metavar="TOKENS")
    ignore_eos: bool = option(False, "whether answers go on to --max-tokens")
    temperature: float = option(0.0, "of the answers", low=0, high=100)
    routing: RoutingContract | None = option(
        None, "routing contract that requests ask for", default_text="the server's"
    )
    slo_ttft_ms: float | None = option(
        None, "objective for the time to the first token, in milliseconds", low=0, open_low=True, metavar="MS"
    )
    slo_tpot_ms: float | None = option(
        None, "objective for the mean time per further token, in milliseconds", low=0, open_low=True, metavar="MS"
    )
    num_warmups: int = option(1, "requests before the run, which do not count", low=0, metavar="N")
    api_key: str | None = option(None, "key of the server", metavar="KEY", default_text="none is sent")
    seed: int = option(0, "of arrivals and of the order of prompts", low=0, metavar="N")
    json: bool = option(False, "whether to print JSON instead of a table")

    def agree(self) -> None:
        """Raise `ConfigError` for options that do not go together."""
        if self.arrivals == "closed" and self.max_concurrency is None:
            raise ConfigError("--arrivals closed needs --max-concurrency, which is the number of users")
        if self.arrivals == "closed" and self.request_rate is not None:
            raise ConfigError("--arrivals closed has no --request-rate: each user sends when it has its answer")
        if self.arrivals in ("gamma", "constant") and self.request_rate is None:
            raise ConfigError(f"--arrivals {self.arrivals} needs a --request-rate")


def parser(command: str = COMMAND) -> Parser:
    """The command line."""
    description = (
        "Send requests to a running server as clients would, and report what these see. The server may be any with "
        "OpenAI's API. Ctrl-C ends the run and reports what it measured until then. The exit status is 1 where no "
        "request was answered, or where the server failed under some."
    )
    made = parser_of(ServeOptions, command, description, {ServeOptions: "load"})
    made.add_argument("url", nargs="?", default=URL, metavar="URL", help=f"address of the server (default: {URL})")
    return made


def main(arguments: Sequence[str] | None = None, command: str = COMMAND) -> int:
    """Measure, and print what clients saw; the exit status."""
    given = read_values(parser(command), ServeOptions, sys.argv[1:] if arguments is None else arguments)
    url = given.pop("url")
    return status_of(lambda: _run(url, ServeOptions(**given)), lambda text: flag_names(text, ServeOptions))


def _run(url: str, options: ServeOptions) -> int:
    options.agree()
    if not re.match(r"https?://", url):
        raise ConfigError(f"{url[:80]!r} is no address of a server; expected one such as {URL}")
    from benchmarks.bench.target import is_failure  # imports httpx

    try:
        numbers = asyncio.run(measure(url.rstrip("/").removesuffix("/v1"), options))
    except KeyboardInterrupt:
        numbers = None
    if numbers is None or (numbers["interrupted"] and not numbers["completed"]):
        print("interrupted before a request was answered", file=sys.stderr)
        return INTERRUPTED
    if options.json:
        print(json.dumps(numbers, indent=1))
    else:
        show(numbers, Console())
    if numbers["interrupted"]:
        print(f"interrupted: {numbers['requests']} of {options.num_prompts} requests had ended", file=sys.stderr)
        return INTERRUPTED
    if failures := {kind: count for kind, count in numbers["errors"].items() if is_failure(kind)}:
        kinds = ", ".join(f"{count} {kind}" for kind, count in failures.items())
        what = f"{sum(failures.values())} of {numbers['requests']} requests ({kinds})"
        print(f"error: the server at {numbers['url']} failed, or died, under {what}", file=sys.stderr)
        return NO
    return OK if numbers["completed"] else NO


async def measure(url: str, options: ServeOptions) -> dict[str, Any]:
    """The numbers of one run. Raises `ServerFailed` where no server answers, `ConfigError` for bad prompts."""
    from benchmarks.bench.target import connected
    from benchmarks.serving.client import closed_loop, open_loop
    from benchmarks.serving.workload import Job, Sample
    from emoe_jax.requests.request import SLO

    prompts = read_prompts(options)
    fields: dict[str, Any] = {
        "temperature": options.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    if options.ignore_eos:
        fields["ignore_eos"] = True
    if options.routing is not None:
        fields["emoe"] = {"routing": options.routing}
    limit = None if options.arrivals == "closed" else options.max_concurrency
    async with connected(url, options.api_key, fields, limit) as server:
        fields["model"] = await server.model()
        due = arrival_times(
            options.arrivals, options.request_rate, options.num_prompts, options.seed, options.burstiness
        )
        jobs = [
            Job(arrival, "", Sample(0, options.max_tokens, prompts[number % len(prompts)]), SLO())
            for number, arrival in enumerate(due)
        ]
        await closed_loop(server, [dataclasses.replace(job, arrival=0.0) for job in jobs[: options.num_warmups]], 1)
        server.forget()
        before, interrupted = await server.state(), False
        try:
            if options.arrivals == "closed":
                assert options.max_concurrency is not None
                await closed_loop(server, jobs, options.max_concurrency)
            else:
                await open_loop(server, jobs)
        except asyncio.CancelledError:  # by Ctrl-C: what was measured until then is reported
            interrupted = True
        records, after = server.records, await server.state()
        return {
            "interrupted": interrupted,
            "url": url,
            "model": fields["model"],
            "arrivals": options.arrivals,
            "request_rate": options.request_rate,
            "burstiness": options.burstiness if options.arrivals == "gamma" else None,
            "max_concurrency": options.max_concurrency,
            "requests": len(records),
            "errors": dict(server.errors.most_common()),
            "prompt_tokens": server.prompt_tokens,
            **seen(records, options),
            "server": between(before, after),
        }


def read_prompts(options: ServeOptions) -> list[tuple[dict[str, str], ...]]:
    """Conversations in the order in which they are sent. Raises `ConfigError` for a file that holds none."""
    import random

    from train import prompts as labelled
    from train.tasks import TASKS

    if options.prompts is None:
        found = [prompt.messages for prompt in labelled.drawn(TASKS, "test", options.seed, 40)]
    elif Path(options.prompts).suffix == ".txt":
        try:
            lines = Path(options.prompts).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise ConfigError(f"{options.prompts}: {reason}") from None
        found = [({"role": "user", "content": line},) for line in lines if line.strip()]
        if not found:
            raise ConfigError(f"{options.prompts} holds no prompts")
    else:
        found = [prompt.messages for prompt in labelled.read(Path(options.prompts))]
    random.Random(options.seed).shuffle(found)
    return found


def seen(records: "Sequence[Record]", options: ServeOptions) -> dict[str, Any]:
    """What clients saw of the requests that were answered; times in seconds, None where none was."""
    from benchmarks.serving.report import summary

    answered = [record for record in records if record.token_times]
    found = summary(answered) if answered else {}
    good = [record for record in answered if _is_good(record, options)]
    has_slo = options.slo_ttft_ms is not None or options.slo_tpot_ms is not None
    rate = found.get("throughput_rps")
    times = (f"p{percentile}_{name}_s" for name in ("ttft", "tpot", "itl", "latency") for percentile in (50, 90, 99))
    return {
        "completed": len(answered),
        "output_tokens": sum(len(record.token_times) for record in answered),
        "seconds": len(answered) / rate if rate else None,
        "request_throughput": rate,
        "output_throughput": found.get("throughput_tok_s"),
        "goodput": rate * len(good) / len(answered) if has_slo and rate else None,
        "slo_attainment": len(good) / len(records) if has_slo else None,
        **{name: found.get(name) for name in times},
    }


def _is_good(record: "Record", options: ServeOptions) -> bool:
    ttft, tpot = options.slo_ttft_ms, options.slo_tpot_ms
    return (ttft is None or 1e3 * record.ttft <= ttft) and (tpot is None or 1e3 * (record.tpot or 0.0) <= tpot)


ROWS = (
    ("requests per second", "request_throughput", "{}"),
    ("tokens of answers per second", "output_throughput", "{}"),
    ("goodput: requests per second within objectives", "goodput", "{}"),
    ("requests within objectives, of all", "slo_attainment", "{:.1%}"),
)
TIMES = (
    ("first token", "ttft"),
    ("per further token", "tpot"),
    ("between events", "itl"),
    ("whole answer", "latency"),
)


def show(numbers: dict[str, Any], console: Console) -> None:
    """Rates, errors by kind, and percentiles of times."""
    of = f"{numbers['completed']:,} of {numbers['requests']:,} requests answered"
    of = f"{of} by {numbers['model']} at {numbers['url']}"
    table = Table(show_header=False, title=escape(of), title_justify="left")
    arrivals = "all at once"
    if numbers["arrivals"] == "closed":
        arrivals = f"closed, {numbers['max_concurrency']:,} users"
    elif numbers["request_rate"] is not None:
        arrivals = f"{numbers['arrivals']}, {format_number(numbers['request_rate'])} per second"
    table.add_row("arrivals", arrivals)
    for label, key, form in ROWS:
        if numbers[key] is not None:
            value = numbers[key] if "%" in form else format_number(numbers[key])
            table.add_row(label, form.format(value))
    for kind, count in numbers["errors"].items():
        table.add_row(f"errors: {escape(kind)}", format_number(count))
    if (server := numbers["server"]) is not None:
        covered = "-" if server["coverage"] is None else f"{server['coverage']:.1%}"
        table.add_row(
            "residency", f"{server['resident_share']:.0%} of the experts, coverage {covered}, {server['loads']:,} loads"
        )
    console.print(table)
    if numbers["completed"]:
        table = Table("milliseconds", *(f"{percentile} %" for percentile in (50, 90, 99)))
        for label, name in TIMES:
            values = (numbers[f"p{percentile}_{name}_s"] for percentile in (50, 90, 99))
            table.add_row(label, *("-" if value is None else format_number(1e3 * value) for value in values))
        console.print(table)


if __name__ == "__main__":
    sys.exit(main())
