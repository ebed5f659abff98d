"""`EngineConfig`: every option of the engine, once. No JAX here."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

from emoe_jax.amounts import parse_bandwidth, parse_bytes, parse_expert_memory
from emoe_jax.errors import ConfigError
from emoe_jax.option_fields import Options, option
from emoe_jax.requests.contract import TOLERANCE, USUAL_TOLERANCE, Allowance, QualityTargets, RoutingContract

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
ExpertFormat = Literal["auto", "int8"]
"""How experts are kept and multiplied; the record formats of `emoe_jax.experts`."""
PredictEvery = int | Literal["auto"]
"""Prompts that share a prediction; "auto" is chosen by cost and gain (`Cadence`)."""

PolicyName = Literal[
    "activation-matrix", "emoe", "emoe-no-refresh", "emoe-paper", "lfu", "lru", "next-layer-router", "pre-gated",
    "random", "static", "static-global", "static-task",
]  # fmt: skip
"""The residency policies of `emoe_jax.policies`."""

PartLeftOut = Literal["slo-without-c", "slo-without-G", "slo-without-dE", "slo-without-aging", "slo-without-guard"]
"""`slo` less one of its parts, to measure what the part is worth."""

SchedulingPolicyName = Literal["slo", "fcfs"] | PartLeftOut
"""The admission policies of `emoe_jax.scheduling`."""


class StepSize(NamedTuple):
    """Sequences and tokens of a step, at most."""

    sequences: int
    tokens: int


USUAL_TARGET = "1%"
"""The quality target under `auto`."""

CPU_STEP = StepSize(16, 512)
ACCELERATOR_STEP = StepSize(256, 8192)


def _expert_memory(value: Any, name: str) -> Any:
    if not parse_expert_memory(str(value), name).amount:
        raise ConfigError(f"{str(value)!r} is nothing; the model needs at least its top-k experts per layer")
    return value


def _bytes(value: Any, name: str) -> Any:
    parse_bytes(name, value)
    return value


def _quality_target(value: Any, name: str) -> Any:
    QualityTargets.parse(str(value), name)
    return value


def _bandwidth(value: Any, name: str) -> Any:
    parse_bandwidth(value, name)
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig(Options):
    """How an engine is set up: the keywords of `Engine.load`, the engine's flags and keys of the configuration file.

    Raises `ConfigError`, one line that names the option, the value and what would be right.
    """

    expert_memory: str | int | Literal["auto"] = option(
        "auto",
        "memory for experts on the device: a share such as 40%, bytes such as 6GiB, or '8 slots' in each layer; auto "
        "is as many as fit",
        noun="a share, bytes or slots",
        metavar="SIZE",
        check=_expert_memory,
    )
    routing: RoutingContract | Literal["auto"] = option(
        "auto",
        "routing contract of requests that name none; auto is bounded, with a quality target of 1%, which waits for "
        "nothing and substitutes nothing where all experts are resident",
    )
    quality_target: str | None = option(
        None,
        "under bounded: by how much the perplexity of answers may be expected to lie above that under all experts, for "
        "example 1%, or 1%,sum=3% with a target for a task; the tolerance of each task follows from audits",
        metavar="PERCENT",
        default_text="1% with --routing auto, else none",
        check=_quality_target,
    )
    audit_rate: float = option(
        0.01,
        "share of the answers that are computed once more under all experts, in idle moments or between steps, to tell "
        "what their contract costs; 0 is none",
        low=0,
        high=1,
        metavar="SHARE",
    )
    tolerance: float | None = option(
        None,
        "under bounded: an absent expert may be left out where its router weight is below this share of the weight of "
        "all experts that the token wishes for in the layer",
        low=TOLERANCE.low,
        high=TOLERANCE.high,
        default_text=f"{USUAL_TOLERANCE} of an even share: {USUAL_TOLERANCE / 4:g} for a router that chooses 4 experts",
    )
    substitution_budget: float | None = option(
        None,
        "under bounded: what the shares that one token gives up may add up to, over its layers",
        low=0,
        default_text="no limit",
        metavar="SHARES",
    )
    sacred: int = option(1, "under bounded: so many first choices of each layer are never left out", low=0, high=1024)
    dtype: Dtype = option(
        "auto",
        "dtype of weights and slab; auto is the checkpoint's on an accelerator, and float32 on a CPU, where "
        "half-precision matrix products are slow",
    )
    expert_format: ExpertFormat = option(
        "auto",
        "how experts are kept on the device and in host memory: int8 takes a quarter of float32's bytes, has a scale "
        "per output channel, and is made while loading from any checkpoint; auto is what the checkpoint has (mxfp4, "
        "fp8, int8), in dtype where its experts are not quantised",
    )
    max_model_len: int | Literal["auto"] = option(
        "auto",
        "tokens that prompt and answer may have together; auto is the model's own limit, or what the KV cache can hold "
        "of one sequence where that is less",
        low=1,
        metavar="TOKENS",
    )
    max_num_seqs: int | Literal["auto"] = option(
        "auto",
        f"sequences computed together; auto is {CPU_STEP.sequences} on a CPU, where each of them makes a step slower, "
        f"and {ACCELERATOR_STEP.sequences} on an accelerator, which reads its weights once for all of them",
        low=1,
        high=4096,
        metavar="N",
    )
    max_num_batched_tokens: int | Literal["auto"] = option(
        "auto",
        f"tokens computed in one step; auto is {CPU_STEP.tokens} on a CPU, where a prompt's tokens hold up sequences "
        f"that decode beside it, and {ACCELERATOR_STEP.tokens} on an accelerator, which few tokens leave idle",
        low=1,
        high=2**20,
        metavar="TOKENS",
    )
    scheduling_policy: SchedulingPolicyName = option(
        "slo",
        "which sequence starts next: by deadlines and expected work, or first come first served; slo-without-PART is "
        "for measuring what a part of slo is worth",
        hidden=get_args(PartLeftOut),
    )
    policy: PolicyName = option("emoe", "residency policy: it decides which experts are kept on the device")
    host_memory: str | int | Literal["auto"] = option(
        "auto",
        "host memory that may keep experts off the device, for example 90GiB, or 0",
        metavar="SIZE",
        default_text="auto: all of them, in at most half of the machine's memory",
        noun="an amount of bytes",
        check=_bytes,
    )
    kv_memory: str | int | None = option(
        None,
        "device memory for the KV cache, for example 8GiB",
        metavar="SIZE",
        default_text="room for --max-num-seqs full sequences, if that fits",
        noun="an amount of bytes",
        check=_bytes,
    )
    device_memory: str | int | None = option(
        None,
        "device memory for weights, experts, KV cache and workspace together",
        metavar="SIZE",
        default_text="what is free of it; on a CPU, the memory of the machine or container",
        noun="an amount of bytes",
        check=_bytes,
    )
    memory_trade: bool = option(
        False, "whether experts make room for the KV cache while requests lack it; compiles for both at the start"
    )
    prefix_caching: bool = option(True, "whether prompts reuse what the KV cache has of their first tokens")
    router_capacity_factor: float | None = option(
        None,
        "routers drop the tokens beyond this factor times an expert's even share of a step's tokens",
        low=0,
        open_low=True,
        metavar="FACTOR",
        default_text="no token is dropped",
    )
    task_profile: str | Path | Literal["auto"] | None = option(
        "auto",
        "file that tells tasks by keywords; auto is the model's own task_profile.json; or none",
        metavar="FILE",
        noun="a file",
    )
    predictor: str | Path | Literal["auto"] | None = option(
        "auto",
        "directory of the predictor, which tells which experts a prompt will use; auto is the model's own; or none",
        metavar="DIR",
        noun="a directory",
    )
    predict_every: PredictEvery = option(
        "auto",
        "prompts that share a prediction, counted as they are admitted: 1 is a prediction for every prompt; auto is "
        "the number that pays, by measured cost and gain, and 40 with the policy emoe-paper",
        low=1,
        metavar="P",
    )
    link_bandwidth: str | float | None = option(
        None,
        "bytes per second that background loads may take, for example 2GiB",
        metavar="SIZE",
        default_text="no limit",
        noun="bytes per second",
        check=_bandwidth,
    )
    link_gbps: float | None = option(
        None,
        "a modelled link, in gigabytes (1e9 bytes) per second: every load takes at least its bytes over that, loads "
        "queue, and those that a step waits for go first; for measuring what a slower link would cost",
        low=0,
        open_low=True,
        metavar="GBPS",
        default_text="none: a load takes what it takes",
    )
    load_wait_ms: float = option(
        50.0,
        "milliseconds that a prompt waits for its prediction and its planned experts while nothing else runs",
        low=0,
        high=60_000,
        metavar="MS",
    )
    overlap: bool = option(True, "whether the host prepares a step while the device computes the one before")
    chat_template: str | Path | None = option(
        None,
        "chat template to use instead of the model's own: a file, or the name of one of several that the model has",
        metavar="FILE",
        noun="a file or a name",
        default_text="the model's own",
    )
    generation_config: Literal["auto", "none"] = option(
        "auto", "sampling defaults of requests: those of the model's generation_config.json, or none of them"
    )
    record_traces: str | Path | None = option(
        None,
        "file in which the routing of all requests is recorded",
        metavar="FILE.npz",
        noun="a file",
        default_text="no recording",
    )
    record_prompt_tokens: bool = option(
        False, "whether a recorded trace also holds the prompts' token ids, which the predictor learns to read"
    )
    trace_ranks: int | None = option(
        None,
        "experts of each token and layer that a recorded trace holds, the best first: more than the router chooses "
        "tell which would have stood in for an absent one, and with what weight",
        low=1,
        metavar="N",
        default_text="those that the router chooses",
    )
    seed: int = option(0, "seed of requests that name none", low=0, high=2**63 - 1, metavar="N")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.record_prompt_tokens and self.record_traces is None:
            raise ConfigError("record_prompt_tokens needs record_traces: there is no trace to hold them")

        if self.quality_target is not None and self.tolerance is not None:
            raise ConfigError("quality_target and tolerance are both given; the tolerance follows from the target")
        if self.quality_target is not None and not self.audit_rate:
            raise ConfigError("quality_target needs an audit_rate above 0: audits tell whether it is kept")

    @property
    def contract(self) -> RoutingContract:
        """Of requests that name none."""
        return "bounded" if self.routing == "auto" else self.routing

    @property
    def targets(self) -> QualityTargets | None:
        """What the tolerances of tasks are tuned to; None where they stay what they are."""
        given = self.quality_target
        if given is None and self.routing == "auto" and self.tolerance is None and self.audit_rate:
            given = USUAL_TARGET
        return None if given is None else QualityTargets.parse(given)

    def bounded(self, top_k: int) -> Allowance:
        """What tokens may give up under the contract `bounded`, by a router that chooses so many experts."""
        tolerance = USUAL_TOLERANCE / top_k if self.tolerance is None else self.tolerance
        budget = math.inf if self.substitution_budget is None else self.substitution_budget
        return Allowance(tolerance, budget, self.sacred)

    @property
    def length_limit(self) -> int | None:
        """Tokens that prompt and answer may have together; None: as many as model and KV cache allow."""
        return None if self.max_model_len == "auto" else self.max_model_len

    def step_size(self, platform: str) -> StepSize:
        """Sequences and tokens of a step on a platform of JAX. `auto` tokens do not go by the sequences that are given,
        and `auto` sequences are no more than the tokens that are given."""
        usual = CPU_STEP if platform == "cpu" else ACCELERATOR_STEP
        tokens = usual.tokens if self.max_num_batched_tokens == "auto" else self.max_num_batched_tokens
        sequences = min(usual.sequences, tokens) if self.max_num_seqs == "auto" else self.max_num_seqs
        return StepSize(sequences, tokens)

    def resolved(self, platform: str) -> Self:
        """With the size of a step on this platform in place of `auto`."""
        size = self.step_size(platform)
        return dataclasses.replace(self, max_num_seqs=size.sequences, max_num_batched_tokens=size.tokens)
