"""Decoding by share of resident experts: `python -m benchmarks.decoding --json FILE`.

The random Mixtral of `benchmarks.peers`, 430 M float32 parameters whose experts fit no cache, in engines that decode in
turns: with all experts resident, and with fewer. A step that meets fewer distinct experts reads fewer bytes. Medians
count.

- `decode_ratio_b1`, `decode_ratio_b16`: tokens per second over those with all experts resident, by batch, under the
  policy that is asked for (`emoe` follows the routers' wishes, so experts are loaded meanwhile).
- `still_ratio_b1`, `still_ratio_b16`: the same with residents that stay (`static`).
- `loading_step_ratio`: step time with loads over that without, batch 16.
- `floor_ratio_b16`: what the bytes that a step reads allow.

JSON: `{"0.4": {"decode_ratio_b1": x, ...}, ...}`.

With `--expert-format` the comparison is another: all experts resident in that format, over all resident in float32.

- `decode_ratio_b1`, `decode_ratio_b8`: tokens per second by batch.

With `--context` another curve is measured: decode and prefill by length of the context (`decoding_context`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from benchmarks import timing
from benchmarks.decoding_context import long_config, measure_contexts, show_contexts
from benchmarks.peers import MODEL, PROMPT, step_bytes
from benchmarks.timing import DecodingBatch
from emoe_jax import EmoeError, Engine
from emoe_jax.engine_config import ExpertFormat, PolicyName
from emoe_jax.errors import one_line
from emoe_jax.models import config_from_hf, save_checkpoint
from emoe_jax.models.decoder import Decoder, init_experts

BATCHES = (1, 16)
FORMAT_BATCHES = (1, 8)
_CONTEXT = 128
_STEPS = 8  # per trial


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.6, 0.4, 0.2], help="of experts resident")
    parser.add_argument("--policy", default="emoe", help="which experts are kept (default %(default)s)")
    parser.add_argument("--link-bandwidth", metavar="BYTES", help="of background loads, such as 256MiB (no limit)")
    parser.add_argument("--repetitions", type=int, help="trials of each engine (default 15), or of each context (3)")
    parser.add_argument(
        "--context", type=int, nargs="+", metavar="TOKENS", help="measure decode and prefill at these contexts instead"
    )
    parser.add_argument(
        "--expert-format",
        choices=get_args(ExpertFormat)[1:],
        help="measure all experts resident in this format instead",
    )
    options = parser.parse_args(argv)
    if options.repetitions is None:
        options.repetitions = 15 if options.context is None else 3
    if options.repetitions < 1:
        parser.error(f"--repetitions is {options.repetitions}; it must be at least 1")
    if not all(0 < share < 1 for share in options.shares):
        parser.error("--shares must lie between 0 and 1")
    if options.context is not None and min(options.context) < 1:
        parser.error(f"--context has {min(options.context)}; a context is at least 1 token")
    try:
        with tempfile.TemporaryDirectory() as directory:
            if options.context is not None:
                write_random_checkpoint(Path(directory), long_config(options.context))
                numbers = measure_contexts(directory, options.context, options.repetitions)
                show_contexts(numbers, Console())
            elif options.expert_format is not None:
                write_random_checkpoint(Path(directory), MODEL)
                numbers = measure_format(directory, options.expert_format, options.repetitions)
                for batch in FORMAT_BATCHES:
                    ratio, step = numbers[f"decode_ratio_b{batch}"], 1e3 * numbers[f"step_s_b{batch}"]
                    print(
                        f"batch {batch}: {options.expert_format} decodes {ratio:.2f}x as fast as float32, {step:.1f} ms"
                    )
            else:
                write_random_checkpoint(Path(directory), MODEL)
                numbers = {
                    f"{share:g}": measure(directory, share, options.policy, options.link_bandwidth, options.repetitions)
                    for share in options.shares
                }
                show(numbers, options.policy, Console())
        if options.json is not None:
            options.json.write_text(json.dumps(numbers, indent=2) + "\n")
    except (EmoeError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def write_random_checkpoint(directory: Path, raw: dict[str, Any]) -> None:
    """A checkpoint of this `config.json` with random weights."""
    config = config_from_hf(raw)
    dense = nnx.state(Decoder(config, rngs=nnx.Rngs(0)))
    save_checkpoint(directory, raw, dense, init_experts(config, jax.random.key(0)))


def measure(model: str, share: float, policy: str, link_bandwidth: str | None, repetitions: int) -> dict[str, float]:
    """The numbers of one share; engines decode in turns, each the same prompts."""
    settings = {"full": (1.0, "static"), "still": (share, "static"), "followed": (share, policy)}
    with contextlib.ExitStack() as stack:
        engines = {
            name: stack.enter_context(_engine(model, part, rule, link_bandwidth))
            for name, (part, rule) in settings.items()
        }
        config, followed = engines["full"].config, engines["followed"]
        numbers, step = {}, {}
        spent: Counter[str] = Counter()
        for batch in BATCHES:
            for engine in engines.values():
                decode_seconds(engine, batch, 0)  # warms up
            before = _totals(followed)
            seconds: dict[str, list[float]] = {name: [] for name in engines}
            for repetition in range(1, repetitions + 1):
                for name, engine in engines.items():
                    seconds[name].append(decode_seconds(engine, batch, repetition))
            spent.update({name: total - before[name] for name, total in _totals(followed).items()})
            step = {name: statistics.median(times) for name, times in seconds.items()}
            numbers[f"decode_ratio_b{batch}"] = step["full"] / step["followed"]
            numbers[f"still_ratio_b{batch}"] = step["full"] / step["still"]
            numbers[f"full_step_s_b{batch}"] = step["full"]
        numbers["loading_step_ratio"] = step["followed"] / step["still"]  # of the largest batch
        residency = followed.state()["residency"]
        numbers["loads_per_step"] = spent["loads"] / spent["steps"]
        numbers["coverage"] = residency["coverage"]
        numbers["planning_share"] = spent["planning_seconds"] / spent["step_seconds"]
        numbers["commit_share"] = spent["commit_seconds"] / spent["step_seconds"]
        capacity = min(residency["slots"])
    batch = BATCHES[-1]
    few = config.num_experts * (1 - (1 - config.top_k / config.num_experts) ** batch)
    idle = few - min(few, capacity * (1 - (1 - config.top_k / capacity) ** batch))
    read = step_bytes(config, batch)
    return numbers | {"floor_ratio_b16": read / (read - 4 * config.num_layers * idle * config.expert_params)}


def measure_format(model: str, expert_format: ExpertFormat, repetitions: int) -> dict[str, float]:
    """Decoding with all experts resident, by batch: the format's speed over that of float32, measured in turns."""
    with contextlib.ExitStack() as stack:
        engines = [
            stack.enter_context(_engine(model, 1.0, "static", None, name, max(FORMAT_BATCHES)))
            for name in ("auto", expert_format)
        ]
        numbers = {}
        for batch in FORMAT_BATCHES:
            for engine in engines:
                decode_seconds(engine, batch, 0)  # warms up
            trials = [[decode_seconds(engine, batch, n) for engine in engines] for n in range(1, repetitions + 1)]
            plain, other = (statistics.median(times) for times in zip(*trials, strict=True))
            numbers |= {f"decode_ratio_b{batch}": plain / other, f"step_s_b{batch}": other}
    return numbers


def _totals(engine: Engine) -> dict[str, float]:
    """What an engine has done so far. Filling the slab and compiling are in it: only differences count."""
    state = engine.state()
    loads = state["residency"]["loads"]
    return {
        "steps": state["steps"],
        "step_seconds": state["step_seconds"],
        "planning_seconds": state["planner"]["planning_seconds"],
        "commit_seconds": loads["commit_seconds"],
        "loads": loads["loads"],
    }


@contextlib.contextmanager
def _engine(
    model: str,
    share: float,
    policy: str,
    link_bandwidth: str | None,
    expert_format: ExpertFormat = "auto",
    most: int = max(BATCHES),
) -> Iterator[Engine]:
    with Engine.load(
        model,
        expert_memory=f"{100 * share:g}%",
        policy=cast(PolicyName, policy),  # the engine's options check it
        routing="resident",
        audit_rate=0.0,
        link_bandwidth=link_bandwidth,
        max_model_len=_CONTEXT,
        max_num_seqs=most,
        expert_format=expert_format,
        prefix_caching=False,
    ) as engine:
        yield engine


def decode_seconds(engine: Engine, batch: int, seed: int) -> float:
    """Mean seconds of a step in which `batch` random prompts decode a token each."""
    prompts = np.random.default_rng(seed).integers(0, engine.config.vocab_size, (batch, PROMPT))
    decoding = DecodingBatch(engine, prompts.tolist(), _STEPS + 1)
    seconds = timing.per_call(decoding.step, _STEPS).wall
    decoding.stop()
    return seconds


def show(numbers: dict[str, dict[str, float]], policy: str, console: Console) -> None:
    config = config_from_hf(MODEL)
    parameters = config.num_layers * config.num_experts * config.expert_params / 1e6
    table = Table(title=f"all experts resident are 1; {parameters:.0f} M expert parameters, float32")
    table.add_column("")
    for share in numbers:
        table.add_column(f"{float(share):.0%} resident", justify="right")
    rows = [
        *((f"tokens/s, {policy}, batch {batch}", f"decode_ratio_b{batch}", "{:.2f}x") for batch in BATCHES),
        *((f"tokens/s, static, batch {batch}", f"still_ratio_b{batch}", "{:.2f}x") for batch in BATCHES),
        ("by the bytes that a step reads, batch 16", "floor_ratio_b16", "{:.2f}x"),
        ("step time with loads over that without", "loading_step_ratio", "{:.3f}"),
        ("loads per step", "loads_per_step", "{:.2f}"),
        ("planning, of step time", "planning_share", "{:.1%}"),
        ("commits, of step time", "commit_share", "{:.1%}"),
    ]
    for label, key, form in rows:
        table.add_row(label, *(form.format(row[key]) for row in numbers.values()))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
