"""The plan of a model on a device: does it fit, for how long and how many sequences, and how fast is it at best."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from emoe_jax.config import ModelConfig
from emoe_jax.engine_config import EngineConfig
from emoe_jax.planning.fit import Fit, Footprint
from emoe_jax.planning.roofline import Roofline, Work, total_seconds
from emoe_jax.planning.targets import Target, cards_by_size

PROMPT = 1024
"""Tokens that a sequence has behind it where times are predicted and nothing is said."""

LARGER = "no --expert-memory, --expert-format, --context or --batch fits: take a larger device"
"""What to change where the weights alone, or top-k experts of each layer, are too much."""


@dataclasses.dataclass(frozen=True)
class Load:
    """What a device is to serve, and how fast."""

    prompt: int = PROMPT
    """Tokens of a prompt, and of each sequence that decodes."""
    batch: int = 1
    """Sequences that decode together."""
    coverage: float | None = None
    """Share of the routers' choices that find their expert on the device. None, and less than experts at random would
    cover, are what these cover."""
    covered: Callable[[float], float] | None = None
    """The coverage by the share of experts that have a slot, such as a trace shows; it goes before `coverage`."""
    ttft_ms: float | None = None
    """Objective for the time to the first token of a prompt alone; None leaves it open."""
    tpot_ms: float | None = None
    """Objective for the time per token of sequences that decode together."""


@dataclasses.dataclass(frozen=True)
class Speed:
    """The least time that a roofline allows, in milliseconds, for a model with so many slots on a device."""

    ttft_ms: float
    tpot_ms: float
    tpot_resident_ms: float
    """Under the contract `resident`, which waits for no expert."""
    coverage: float
    bound: str
    """What takes most of a decode step: `memory`, `products`, `link` or `overhead`."""

    @classmethod
    def of(cls, roofline: Roofline, target: Target, load: Load, chunk: int) -> "Speed":
        """`chunk` is the most tokens of a step."""
        decode = roofline.decode(load.batch, load.prompt, load.coverage)
        prefill = roofline.prefill(load.prompt, chunk, load.coverage)
        resident: Work = roofline.decode(load.batch, load.prompt, coverage=1.0)
        return cls(
            ttft_ms=1e3 * total_seconds(prefill, target, roofline.dtype),
            tpot_ms=1e3 * decode.seconds(target, roofline.dtype),
            tpot_resident_ms=1e3 * resident.seconds(target, roofline.dtype),
            coverage=roofline.coverage(load.coverage),
            bound=decode.bound(target, roofline.dtype),
        )

    def meets(self, load: Load) -> bool:
        """Whether both objectives are kept; one that is left open is."""
        kept = load.ttft_ms is None or self.ttft_ms <= load.ttft_ms
        return kept and (load.tpot_ms is None or self.tpot_ms <= load.tpot_ms)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is said of a model on a device."""

    model: str
    target: Target
    footprint: Footprint
    load: Load
    fit: Fit
    speed: Speed
    """Times of what fits; of what does not, they would be of a device with more room."""
    smallest_device: str | None
    """The known card of the least memory on which the model fits and meets the objectives; None where there is none."""
    advice: tuple[str, ...]
    """What to change where it does not fit or is too slow."""

    @property
    def meets_slo(self) -> bool | None:
        """Whether the objectives are kept; None where there are none."""
        is_open = self.load.ttft_ms is None and self.load.tpot_ms is None
        return None if is_open else self.fit.fits and self.speed.meets(self.load)

    def as_json(self) -> dict[str, Any]:
        """Numbers by name, for programs. What does not fit has no times."""
        config, parts, speed = self.footprint.config, self.fit.parts, self.speed
        fits = self.fit.fits
        return {
            "model": self.model,
            "device": self.target.name,
            "device_bytes": self.target.memory_bytes,
            "fits": fits,
            "problem": self.fit.problem,
            "context": self.fit.context,
            "batch": self.footprint.batch,
            "max_context": self.fit.max_context,
            "max_batch": self.fit.max_batch,
            "memory_bytes": dataclasses.asdict(parts) | {"total": parts.total},
            "dtype": self.footprint.dtype,
            "expert_format": self.footprint.expert_format,
            "resident_share": self.fit.slots / (len(config.moe_layers) * config.num_experts),
            "prompt": self.load.prompt,
            "coverage": speed.coverage,
            "ttft_ms": speed.ttft_ms if fits else None,
            "tpot_ms": speed.tpot_ms if fits else None,
            "tpot_resident_ms": speed.tpot_resident_ms if fits else None,
            "bound": speed.bound if fits else None,
            "meets_slo": self.meets_slo,
            "smallest_device": self.smallest_device,
            "advice": list(self.advice),
        }


def plan_model(
    model: str,
    config: ModelConfig,
    target: Target,
    options: EngineConfig,
    load: Load,
    efficiency: float,
    is_here: bool = False,
) -> Plan:
    """The plan of a model on a device, under an engine's options.

    Steps are compiled, which takes seconds. With `is_here` the device is this machine's own, and the memory is what
    `Engine.load` would plan. Other devices are cards, whose own rates count by `efficiency`. Raises `ConfigError` where
    options do not suit the model.
    """
    if is_here:
        footprint = Footprint(config, options, target.platform, None)
        cards = footprint if target.platform == "gpu" else dataclasses.replace(footprint, platform="gpu")
        fit = footprint.fit_here(target)
    else:
        footprint = cards = Footprint.compiled(config, options, target.platform)
        fit = footprint.fit(target)
    speed = speed_of(footprint, fit, target, load)
    if fit.fits:  # a card has to hold as long sequences
        cards = cards.with_options(dataclasses.replace(options, max_model_len=fit.context))
    smallest = next((card.name for card in cards_by_size(efficiency) if _suits(cards, card, load)), None)
    advice = () if fit.fits and speed.meets(load) else tuple(advised(footprint, fit, speed, target, load))
    return Plan(model, target, footprint, load, fit, speed, smallest, advice)


def speed_of(footprint: Footprint, fit: Fit, target: Target, load: Load) -> Speed:
    """The times of a model that fits, or would."""
    roofline = Roofline(
        footprint.config, footprint.dtype, footprint.expert_format, slots=fit.slots / len(footprint.config.moe_layers)
    )
    chunk = footprint.options.step_size(target.platform).tokens
    if load.covered is not None:
        load = dataclasses.replace(load, coverage=load.covered(roofline.slots / footprint.config.num_experts))
    return Speed.of(roofline, target, load, chunk)


def advised(footprint: Footprint, fit: Fit, speed: Speed, target: Target, load: Load) -> Iterator[str]:
    """Changes that each would do alone, tried before they are named. Where none does, what does together."""
    if not fit.fits:
        alone = list(_room_for_all(footprint, fit, target, load))
        is_open = load.ttft_ms is None and load.tpot_ms is None
        yield from alone or list(_room_for_one(footprint, target, load)) or ([LARGER] if is_open else [])
    elif load.tpot_ms is not None and speed.tpot_ms > load.tpot_ms:
        yield from _faster(footprint, fit, speed, target, load)


def _room_for_all(footprint: Footprint, fit: Fit, target: Target, load: Load) -> Iterator[str]:
    options = footprint.options

    def does(changed: EngineConfig, load: Load = load) -> bool:
        return _suits(footprint.with_options(changed), target, load)

    for expert_format in dict.fromkeys((options.expert_format, "int8")):
        flags = "" if expert_format == options.expert_format else " --expert-format int8"
        other = dataclasses.replace(options, expert_format=expert_format)
        if flags and does(other):
            yield f"{flags.strip()} fits with the same --expert-memory"
            continue
        share = footprint.with_options(other).largest_share(target)
        if share is not None and does(dataclasses.replace(other, expert_memory=f"{share:g}%")):
            yield f"--expert-memory {share:g}%{flags} fits: the most of the experts that leaves room for the sequences"
    context, batch = fit.max_context, fit.max_batch
    shorter = dataclasses.replace(load, prompt=min(load.prompt, context))
    if context >= 2 and does(dataclasses.replace(options, max_model_len=context), shorter):
        yield f"--context {context} fits: the longest sequences, {footprint.batch:,} at once"
    fewer = dataclasses.replace(load, batch=batch)
    if 0 < batch < footprint.batch and does(dataclasses.replace(options, max_num_seqs=batch), fewer):
        yield f"--batch {batch} fits: as many sequences of {fit.context:,} tokens as have room at once"


def _room_for_one(footprint: Footprint, target: Target, load: Load) -> Iterator[str]:
    options = dataclasses.replace(footprint.options, max_num_seqs=1)
    for expert_format in dict.fromkeys((options.expert_format, "int8")):
        flags = "" if expert_format == options.expert_format else " --expert-format int8"
        other = dataclasses.replace(options, expert_format=expert_format)
        share = footprint.with_options(other).largest_share(target)
        if share is None:
            continue
        changed = footprint.with_options(dataclasses.replace(other, expert_memory=f"{share:g}%"))
        if _suits(changed, target, dataclasses.replace(load, batch=1)):
            yield f"--batch 1 --expert-memory {share:g}%{flags} fits: no one change alone does"


def _faster(footprint: Footprint, fit: Fit, speed: Speed, target: Target, load: Load) -> Iterator[str]:
    def tpot(changed: Load) -> float:
        return speed_of(footprint, fit, target, changed).tpot_ms

    def with_coverage(coverage: float) -> Load:
        return dataclasses.replace(load, coverage=coverage, covered=None)

    assert load.tpot_ms is not None
    if tpot(with_coverage(1.0)) <= load.tpot_ms:
        low, high = speed.coverage, 1.0
        while high - low > 5e-4:
            middle = (low + high) / 2
            fast = tpot(with_coverage(middle)) <= load.tpot_ms
            low, high = (low, middle) if fast else (middle, high)
        yield f"a coverage of {high:.3f} meets the time per token; {speed.coverage:.3f} was taken"
    elif speed.tpot_resident_ms > load.tpot_ms:
        yield "no coverage meets the time per token: what a step reads on this device takes longer"
    smaller = [batch for batch in _halves(load.batch) if tpot(dataclasses.replace(load, batch=batch)) <= load.tpot_ms]
    if smaller:
        yield f"--batch {smaller[0]} meets the time per token"


def _halves(batch: int) -> Iterator[int]:
    while batch > 1:
        batch //= 2
        yield batch


def _suits(footprint: Footprint, card: Target, load: Load) -> bool:
    fit = footprint.fit(card)
    return fit.fits and speed_of(footprint, fit, card, load).meets(load)
