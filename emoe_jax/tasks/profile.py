"""What is known of each task before its requests come: one JSON file, made offline by the `train` commands."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from emoe_jax.config import ModelConfig
from emoe_jax.errors import ConfigError, RequestError
from emoe_jax.requests.request import SLO

VERSION = 1
OTHER = "other"
"""The task of a request that no profiled task fits."""
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
MAX_KEYWORD_WORDS = 4


@dataclasses.dataclass(frozen=True)
class Lengths:
    """How many tokens the answers to a task had, over `count` of them. `quantiles[i]` belongs to `QUANTILES[i]`."""

    count: int
    mean: float
    quantiles: tuple[float, ...]

    @classmethod
    def of(cls, tokens: list[int]) -> "Lengths":
        """The distribution of at least one observed length."""
        return cls(len(tokens), float(np.mean(tokens)), tuple(np.quantile(tokens, QUANTILES).tolist()))


@dataclasses.dataclass(frozen=True)
class Task:
    """One task. What has not been profiled is None; `prompts` and `tokens` count what `routing` was measured on."""

    keywords: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Up to four lower-case words in a row, and how much finding them speaks for the task."""
    output_length: Lengths | None = None
    sensitivity: tuple[float, ...] | None = None
    """Per MoE layer, 0 (the wrong expert does no harm) to 1: `s` of eMoE eq. 2."""
    routing: Float[np.ndarray, "M E"] | None = None
    """Mean share of each expert; each layer sums to 1."""
    slo: SLO | None = None
    """Deadlines of requests that name none."""
    prompts: int = 0
    tokens: int = 0


@dataclasses.dataclass(frozen=True)
class TaskProfile:
    """All tasks of one model, which is told by its numbers of MoE layers and experts and its top-k.

    `threshold`: the score that keywords must add up to, below which a prompt is of no known task.
    """

    num_layers: int
    num_experts: int
    top_k: int
    threshold: float = 1.0
    tasks: Mapping[str, Task] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if OTHER in self.tasks:
            raise ConfigError(f"the task profile has a task {OTHER!r}; that name stands for no known task")

    @classmethod
    def empty(cls, config: ModelConfig) -> "TaskProfile":
        """A profile of a model, without tasks."""
        return cls(len(config.moe_layers), config.num_experts, config.top_k)

    @classmethod
    def load(cls, path: str | Path) -> "TaskProfile":
        """Read and check a profile. Raises `ConfigError` with one line that names the file and what is wrong."""
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_no_constant)
        except OSError as error:
            raise ConfigError(f"task profile {path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"task profile {path} is not valid JSON: {' '.join(str(error).split())}") from None
        try:
            return _profile(raw)
        except _Invalid as error:
            raise ConfigError(f"task profile {path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the file whole or not at all. Raises `ConfigError` when it cannot be written."""
        path = Path(path)
        draft = path.with_name(path.name + ".draft")
        try:
            draft.write_text(json.dumps(self._raw(), indent=1) + "\n", encoding="utf-8")
            draft.replace(path)
        except OSError as error:
            raise ConfigError(f"task profile {path}: {error.strerror}") from None

    def check(self, config: ModelConfig) -> None:
        """Raise `ConfigError` when the profile is of another model."""
        ours, theirs = (self.num_layers, self.num_experts, self.top_k), TaskProfile.empty(config)
        if ours != (theirs.num_layers, theirs.num_experts, theirs.top_k):
            raise ConfigError(
                f"the task profile is of a model with {self.num_layers} MoE layers of {self.num_experts} experts, "
                f"top-{self.top_k}; this model has {theirs.num_layers} of {theirs.num_experts}, top-{theirs.top_k}"
            )

    def with_task(self, name: str, **changes: Any) -> "TaskProfile":
        """A copy in which fields of one task, new or known, are replaced."""
        task = dataclasses.replace(self.tasks.get(name, Task()), **changes)
        return dataclasses.replace(self, tasks={**self.tasks, name: task})

    def output_tokens(self, task: str | None, default: float) -> float:
        """Expected answer length of a task (`W_o` of eq. 2), of all tasks where it is not known, else `default`."""
        known = {name: entry.output_length for name, entry in self.tasks.items() if entry.output_length is not None}
        if task in known:
            return known[task].mean
        return sum(lengths.mean for lengths in known.values()) / len(known) if known else default

    def sensitivity(self, task: str | None) -> Float[np.ndarray, " M"]:
        """`s` of eq. 2 per MoE layer; 1 where nothing is known."""
        entry = self.tasks.get(task or OTHER)
        known = None if entry is None else entry.sensitivity
        return np.ones(self.num_layers) if known is None else np.array(known)

    def frequency(self, task: str | None) -> Float[np.ndarray, "M E"]:
        """Mean routing of a task, of all tasks where it is not known, uniform where none is."""
        entry = self.tasks.get(task or OTHER)
        if entry is not None and entry.routing is not None:
            return entry.routing
        known = [entry.routing for entry in self.tasks.values() if entry.routing is not None]
        if known:
            return np.mean(known, axis=0)
        return np.full((self.num_layers, self.num_experts), 1 / self.num_experts)

    def routed_alike(self) -> "TaskProfile":
        """A copy in which every task has the mean routing of all."""
        mean = self.frequency(None)
        return dataclasses.replace(
            self, tasks={name: dataclasses.replace(task, routing=mean) for name, task in self.tasks.items()}
        )

    def _raw(self) -> dict[str, Any]:
        tasks = {}
        for name, task in self.tasks.items():
            lengths = task.output_length
            tasks[name] = {
                "keywords": {keyword: round(weight, 4) for keyword, weight in task.keywords.items()},
                "output_length": None
                if lengths is None
                else {
                    "count": lengths.count,
                    "mean": lengths.mean,
                    "quantiles": dict(zip(map(str, QUANTILES), lengths.quantiles, strict=True)),
                },
                "sensitivity": None if task.sensitivity is None else list(task.sensitivity),
                "routing": None if task.routing is None else np.round(task.routing, 6).tolist(),
                "slo": None if task.slo is None else dataclasses.asdict(task.slo),
                "prompts": task.prompts,
                "tokens": task.tokens,
            }
        model = {"num_layers": self.num_layers, "num_experts": self.num_experts, "top_k": self.top_k}
        return {"version": VERSION, "model": model, "threshold": self.threshold, "tasks": tasks}


class _Invalid(Exception):
    """What is wrong with a profile, in one line without the file's name."""


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def _profile(raw: Any) -> TaskProfile:
    raw = _object(raw, "the profile")
    version = raw.get("version")
    if version != VERSION:
        raise _Invalid(f"version is {str(version)[:40]}; this program reads version {VERSION}")
    model = _object(raw.get("model"), "model")
    M, E, k = (_integer(model.get(name), f"model.{name}", 1) for name in ("num_layers", "num_experts", "top_k"))
    if k > E:
        raise _Invalid(f"model.top_k is {k} of only {E} experts")
    tasks = {}
    for name, task in _object(raw.get("tasks"), "tasks").items():
        if not name.strip() or name == OTHER:
            raise _Invalid(f"{name!r} cannot be the name of a task")
        tasks[name] = _task(_object(task, f"tasks.{name}"), f"tasks.{name}", M, E)
    return TaskProfile(M, E, k, _number(raw.get("threshold"), "threshold", 0), tasks)


def _task(raw: dict[str, Any], where: str, M: int, E: int) -> Task:
    keywords = {}
    for keyword, weight in _object(raw.get("keywords", {}), f"{where}.keywords").items():
        if not 1 <= len(keyword.split()) <= MAX_KEYWORD_WORDS:
            raise _Invalid(f"{where}.keywords: {keyword[:40]!r} is not one to {MAX_KEYWORD_WORDS} words")
        keywords[keyword] = _number(weight, f"{where}.keywords[{keyword[:40]!r}]", 0)
    sensitivity = raw.get("sensitivity")
    if sensitivity is not None:
        sensitivity = tuple(_vector(sensitivity, f"{where}.sensitivity", M, 1))
    routing = raw.get("routing")
    if routing is not None:
        if not isinstance(routing, list) or len(routing) != M:
            raise _Invalid(f"{where}.routing must be a list of {M} layers")
        routing = np.array([_vector(layer, f"{where}.routing[{m}]", E, 1) for m, layer in enumerate(routing)])
        sums = routing.sum(axis=1)
        if np.abs(sums - 1).max() > 0.01:
            raise _Invalid(f"{where}.routing: a layer sums to {sums[np.abs(sums - 1).argmax()]:.3f}; it must be 1")
    lengths = raw.get("output_length")
    return Task(
        keywords,
        None if lengths is None else _lengths(_object(lengths, f"{where}.output_length"), f"{where}.output_length"),
        sensitivity,
        routing,
        _slo(raw.get("slo"), f"{where}.slo"),
        _integer(raw.get("prompts", 0), f"{where}.prompts", 0),
        _integer(raw.get("tokens", 0), f"{where}.tokens", 0),
    )


def _slo(raw: Any, where: str) -> SLO | None:
    if raw is None:
        return None
    raw = _object(raw, where)
    known = {field.name for field in dataclasses.fields(SLO)}
    if unknown := sorted(set(raw) - known):
        raise _Invalid(f"{where} has {unknown[0][:40]!r}; it can have {', '.join(sorted(known))}")
    try:
        return SLO(**raw)
    except RequestError as error:
        raise _Invalid(f"{where}: {error}") from None


def _lengths(raw: dict[str, Any], where: str) -> Lengths:
    quantiles = _object(raw.get("quantiles"), f"{where}.quantiles")
    values = tuple(_number(quantiles.get(str(q)), f"{where}.quantiles[{q}]", 0) for q in QUANTILES)
    if list(values) != sorted(values):
        raise _Invalid(f"{where}.quantiles must not fall")
    count, mean = _integer(raw.get("count"), f"{where}.count", 1), _number(raw.get("mean"), f"{where}.mean", 0)
    return Lengths(count, mean, values)


def _object(raw: Any, where: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise _Invalid(f"{where} is {'missing' if raw is None else type(raw).__name__}; it must be a JSON object")
    return raw


def _vector(raw: Any, where: str, length: int, high: float) -> list[float]:
    if not isinstance(raw, list) or len(raw) != length:
        raise _Invalid(f"{where} must be a list of {length} numbers")
    return [_number(value, f"{where}[{index}]", 0, high) for index, value in enumerate(raw)]


def _integer(raw: Any, where: str, low: int) -> int:
    if isinstance(raw, bool) or not isinstance(raw, int) or raw < low:
        raise _Invalid(f"{where} is {str(raw)[:40]}; it must be an integer of at least {low}")
    return raw


def _number(raw: Any, where: str, low: float, high: float = math.inf) -> float:
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not low <= raw <= high or raw > 1e300:
        bounds = f"of at least {low}" if high == math.inf else f"between {low} and {high}"
        raise _Invalid(f"{where} is {str(raw)[:40]}; it must be a number {bounds}")
    return float(raw)
