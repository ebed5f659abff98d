"""`emoe plan MODEL`, which is `python -m serve.plan MODEL`: what a model needs of a device, before there is either.

Exit status: 0 where the model fits and meets the objectives, 1 where it does not, 2 for a mistake named in one line.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from typing import Any, Literal

from emoe_jax.amounts import parse_bytes
from emoe_jax.demo import MISSING, demo_model, is_missing
from emoe_jax.engine_config import Dtype, EngineConfig, ExpertFormat
from emoe_jax.errors import ConfigError, EmoeError, one_line
from emoe_jax.option_fields import Options, option
from emoe_jax.planning.targets import EFFICIENCY
from serve.flags import flag_names, parser_of, read_values
from serve.interrupt import INTERRUPTED

COMMAND = "python -m serve.plan"
FITS, DOES_NOT, MISTAKE = 0, 1, 2


def _bytes(value: Any, name: str) -> Any:
    parse_bytes(name, value)
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions(Options):
    """What `emoe plan` is told, beside the model. Names that the server has too mean the same."""

    device: str | None = option(
        None,
        "a known card, such as rtx4090, l40s, a100-80gb, h100-80gb or h200",
        metavar="NAME",
        default_text="this machine's device, with rates measured now",
    )
    device_memory: str | int | None = option(
        None,
        "device memory for weights, experts, KV cache and workspace together",
        metavar="SIZE",
        default_text="90% of the card; of this machine's device, what is free",
        noun="an amount of bytes",
        check=_bytes,
    )
    hbm_gbps: float | None = option(
        None, "bandwidth of the device's memory, in 1e9 bytes per second", low=0, open_low=True, metavar="N"
    )
    link_gbps: float | None = option(
        None, "bandwidth from the host to the device, in 1e9 bytes per second", low=0, open_low=True, metavar="N"
    )
    tflops: float | None = option(
        None,
        "products of the dtype that is computed in, in 1e12 operations per second",
        low=0,
        open_low=True,
        metavar="N",
        default_text="that of the card; of a device of your own, products take no time",
    )
    efficiency: float = option(
        EFFICIENCY,
        "share of a card's own rates that steps are taken to reach; an assumption until steps were measured on one",
        low=0,
        high=1,
        open_low=True,
        metavar="SHARE",
    )
    expert_memory: str | int | Literal["auto"] = option(
        "auto",
        "memory for experts on the device, as of the server: 40%, 6GiB, '8 slots', or as many as fit",
        noun="a share, bytes or slots",
        metavar="SIZE",
    )
    expert_format: ExpertFormat = option("auto", "how experts are kept; auto is what the checkpoint has")
    dtype: Dtype = option("auto", "dtype of weights and slab; auto is the checkpoint's, and float32 on a CPU")
    context: int | None = option(
        None,
        "tokens that prompt and answer may have together: --max-model-len of the server",
        low=2,
        metavar="TOKENS",
        default_text="the model's own limit, or what fits",
    )
    batch: int | None = option(
        None,
        "sequences that are to have room at once: --max-num-seqs of the server",
        low=1,
        high=4096,
        metavar="N",
        default_text="the server's own, of which one must have room",
    )
    max_num_batched_tokens: int | Literal["auto"] = option(
        "auto", "tokens computed in one step, as of the server", low=1, high=2**20, metavar="TOKENS"
    )
    prompt: int | None = option(
        None,
        "tokens of the prompt whose time to the first token is predicted, and of each sequence that decodes",
        low=1,
        metavar="TOKENS",
        default_text="--context if given, else 1024 or the model's limit",
    )
    coverage: float | None = option(
        None,
        "share of the routers' choices that find their expert on the device; the others wait for the link",
        low=0,
        high=1,
        metavar="SHARE",
        default_text="the share of experts that are resident: the worst case",
    )
    slo_ttft_ms: float | None = option(
        None, "objective for the time to the first token, in milliseconds", low=0, open_low=True, metavar="MS"
    )
    slo_tpot_ms: float | None = option(
        None, "objective for the time per output token, in milliseconds", low=0, open_low=True, metavar="MS"
    )
    check: bool = option(
        False,
        "whether to predict steps of the demo and of a random model on this machine, run them, and compare the times",
    )
    json: bool = option(False, "whether to print JSON instead of a table")

    def engine_options(self) -> EngineConfig:
        """The options of the engine that is planned for. Raises `ConfigError`."""
        return EngineConfig(
            expert_memory=self.expert_memory,
            expert_format=self.expert_format,
            dtype=self.dtype,
            max_model_len=self.context or "auto",
            max_num_seqs=self.batch or "auto",
            max_num_batched_tokens=self.max_num_batched_tokens,
        )

    def agree(self) -> None:
        """Raise `ConfigError` for options that do not go together."""
        rates = {"hbm_gbps": self.hbm_gbps, "link_gbps": self.link_gbps, "tflops": self.tflops}
        given = [name for name, value in rates.items() if value is not None]
        needed = {"device_memory": self.device_memory, "hbm_gbps": self.hbm_gbps, "link_gbps": self.link_gbps}
        missing = [name for name, value in needed.items() if value is None]
        if self.device is None and given and missing:
            raise ConfigError(
                f"{given[0]} describes a device of your own; give {' and '.join(missing)}, too, or a known card as "
                "device"
            )


def main(arguments: Sequence[str] | None = None, command: str = COMMAND) -> int:
    """Plan, and print it; the exit status. `command` is how it was called, for the help text."""
    parser = parser_of(
        PlanOptions,
        command,
        "What a model needs of a device, and how fast it is there at best, from its config.json alone.",
        {PlanOptions: "plan"},
    )
    parser.add_argument(
        "model",
        nargs="?",
        default=str(demo_model()),
        metavar="MODEL",
        help="directory with a config.json, a config.json, or a known model such as mixtral-8x7b (default: the demo)",
    )
    given = read_values(parser, PlanOptions, sys.argv[1:] if arguments is None else arguments)
    model = given.pop("model")
    if is_missing(model):
        parser.error(MISSING)
    try:
        options = PlanOptions(**given)
        options.agree()
        if options.check:
            return _check(options.json)
        from serve.planned import make_plan, print_plan  # takes seconds, which a mistake need not wait for

        plan = make_plan(model, options)
        if options.json:
            print(json.dumps(plan.as_json(), indent=1))
        else:
            print_plan(plan)
    except (EmoeError, OSError) as error:
        print(f"error: {as_flags(one_line(error))}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        return INTERRUPTED
    return FITS if plan.fit.fits and plan.meets_slo is not False else DOES_NOT


def _check(as_json: bool) -> int:
    """Predict and measure on this machine. Minutes the first time, as engines compile their steps."""
    from rich.console import Console

    from benchmarks import planning
    from serve.start import keep_compilations

    keep_compilations()
    numbers = planning.check(planning.REPETITIONS)
    if as_json:
        print(json.dumps(numbers, indent=1))
    else:
        planning.show(numbers, Console())
    return FITS


def as_flags(message: str) -> str:
    """An error of the library with its options' names as flags of this command."""
    for name, ours in (("max_model_len", "context"), ("max_num_seqs", "batch")):
        message = re.sub(rf"(?<![\w/.-]){name}(?![\w/.-])", f"--{ours}", message)
    return flag_names(message, PlanOptions)


if __name__ == "__main__":
    sys.exit(main())
