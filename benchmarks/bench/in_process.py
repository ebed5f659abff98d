"""What `emoe bench latency` and `throughput` share: an engine in this process, prompts, and timed answers."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.serving.report import Record
from benchmarks.serving.workload import Job, Sample
from emoe_jax import Engine, SamplingParams
from emoe_jax.amounts import format_number
from emoe_jax.engine_config import EngineConfig
from emoe_jax.errors import ConfigError
from emoe_jax.option_fields import options_of
from emoe_jax.requests.request import SLO
from serve.console import loading_progress
from serve.start import keep_compilations

clock = time.perf_counter


@contextlib.contextmanager
def loaded(model: str, options: EngineConfig, sequences: int) -> Iterator[Engine]:
    """An engine with all its shapes compiled, whose steps have room for so many sequences unless the options say how
    many. Progress goes to stderr."""
    keep_compilations()
    names = [option.name for option in options_of(EngineConfig)]
    config = EngineConfig(**{name: getattr(options, name) for name in names})
    if config.max_num_seqs == "auto":
        usual = config.step_size(jax.default_backend())
        tokens = max(usual.tokens, sequences) if config.max_num_batched_tokens == "auto" else usual.tokens
        config = dataclasses.replace(config, max_num_seqs=min(sequences, tokens), max_num_batched_tokens=tokens)
    console = Console(stderr=True)
    with loading_progress(console) as report, Engine.load(model, config, progress=report) as engine:
        report("compile", 0, 1)
        engine.warm_up(progress=report)
        yield engine


def random_prompts(engine: Engine, count: int, tokens: int, answer: int, seed: int) -> list[list[int]]:
    """So many different prompts of random tokens. Raises `ConfigError` where prompt and answer exceed the context."""
    if tokens + answer > engine.max_model_len:
        raise ConfigError(
            f"--input-len {tokens} and --output-len {answer} are {tokens + answer} tokens; the context has "
            f"{engine.max_model_len}"
        )
    drawn = np.random.default_rng(seed).integers(0, engine.config.vocab_size, (count, tokens))
    return drawn.tolist()


def answer_all(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int) -> list[Record]:
    """Hand over all prompts at once, and compute answers of exactly so many tokens, greedily. Times are in seconds from
    then on."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    times: dict[str, list[float]] = {f"bench {number}": [] for number in range(len(prompts))}
    began = clock()
    for request, prompt in zip(times, prompts, strict=True):
        engine.add_request(request, list(prompt), params)
    running = set(times)
    while running:
        for delta in engine.step():
            times[delta.request_id] += [clock() - began] * len(delta.token_ids)
            if delta.finish_reason is not None:
                engine.pop(delta.request_id)
                running.discard(delta.request_id)
    return [
        Record(Job(0.0, "random", Sample(len(prompt), tokens), SLO()), tuple(found))
        for prompt, found in zip(prompts, times.values(), strict=True)
    ]


def described(engine: Engine, model: str) -> dict[str, Any]:
    """What was measured: the model, its device, how much of it is resident, and what that meant for the requests."""
    residency = engine.state()["residency"]
    return {
        "model": str(Path(model)),
        "device": jax.devices()[0].device_kind,
        "dtype": engine.memory.dtype,
        "expert_format": engine.memory.expert_format,
        "resident_share": residency["share"],
        "routing": engine.options.contract,
        "coverage": residency["coverage"],
        "loads": residency["loads"]["loads"],
    }


def show(numbers: dict[str, Any], title: str, rows: Sequence[tuple[str, str, str]]) -> None:
    """A table of these numbers: a label, a key, and what is written around the number, or how a share is."""
    table = Table(show_header=False, title=escape(title), title_justify="left")
    for label, key, form in rows:
        value = numbers[key]
        if isinstance(value, int | float) and "%" not in form:
            value = format_number(value)
        table.add_row(label, "-" if value is None else escape(form.format(value)))
    Console().print(table)


ABOUT = (
    ("device", "device", "{}"),
    ("experts resident", "resident_share", "{:.0%}"),
    ("routing", "routing", "{}"),
    ("coverage", "coverage", "{:.1%} of the routers' choices"),
    ("experts loaded, since the start", "loads", "{}"),
)
"""Rows of `described`."""
