"""From the options of `emoe plan` to a plan, and to what is printed of it."""

import dataclasses
import math

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from emoe_jax.amounts import format_bytes, format_number, parse_bytes
from emoe_jax.config import ModelConfig
from emoe_jax.errors import ConfigError
from emoe_jax.memory.device_settings import prepare_devices
from emoe_jax.memory.plan import machine_memory, usable_memory
from emoe_jax.planning.catalogue import find_model
from emoe_jax.planning.plan import PROMPT, Load, Plan, plan_model
from emoe_jax.planning.rates import this_machine
from emoe_jax.planning.targets import Costs, Target
from serve.plan import PlanOptions
from serve.start import keep_compilations
from serve.trace_coverage import covered_by


def make_plan(model: str, options: PlanOptions) -> Plan:
    """The plan that was asked for. Raises `ConfigError`, `CheckpointError` or `CapacityError`."""
    engine_options = options.engine_options()
    name, config = find_model(model)
    is_here = options.device is None and options.hbm_gbps is None
    if is_here:
        prepare_devices(machine_memory())
    keep_compilations()
    return plan_model(
        name, config, target_of(options), engine_options, load_of(options, config), options.efficiency, is_here
    )


def target_of(options: PlanOptions) -> Target:
    """The device that the options name or describe, or this machine's."""
    rates = {
        name: factor * value
        for name, factor, value in (
            ("bandwidth", 1e9, options.hbm_gbps),
            ("link", 1e9, options.link_gbps),
            ("half_flops", 1e12, options.tflops),
            ("float32_flops", 1e12, options.tflops),
        )
        if value is not None
    }
    if options.device is not None:
        target = Target.of_card(options.device, options.efficiency)
    elif rates:
        unbounded = {"half_flops": math.inf, "float32_flops": math.inf}
        target = Target("a device of your own", "gpu", 0, costs=Costs(), **unbounded | rates)
    else:
        return this_machine(usable_memory(options.device_memory))
    memory = target.memory_bytes
    if options.device_memory is not None:
        memory = parse_bytes("device_memory", options.device_memory)
        if 0 < target.memory_bytes < memory:
            raise ConfigError(
                f"device_memory is {format_bytes(memory)}; expected at most {format_bytes(target.memory_bytes)}, "
                f"90 % of {target.name}"
            )
    return dataclasses.replace(target, memory_bytes=memory, **rates)


def load_of(options: PlanOptions, config: ModelConfig) -> Load:
    """What times are predicted for."""
    prompt = options.prompt or options.context or min(PROMPT, config.max_position)
    limit = options.context or config.max_position
    if prompt > limit:
        raise ConfigError(f"the prompt has {prompt} tokens; expected at most {limit}, those of the longest context")
    covered = None if options.trace is None else covered_by(options.trace, config)
    return Load(prompt, options.batch or 1, options.coverage, covered, options.slo_ttft_ms, options.slo_tpot_ms)


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """The plan as a table, and what to change as lines."""
    fit, speed, load = plan.fit, plan.speed, plan.load
    config = plan.footprint.config
    experts = len(config.moe_layers) * config.num_experts
    table = Table(show_header=False, title=escape(f"{plan.model} on {plan.target.name}"), title_justify="left")
    table.add_row("fits", "yes" if fit.fits else escape(f"no: {fit.problem}"))
    for what, size in (
        ("weights without experts", fit.parts.weights),
        (f"slab of {fit.slots:,} of {experts:,} experts, {plan.footprint.expert_format}", fit.parts.slab),
        ("KV cache", fit.parts.kv),
        ("workspace", fit.parts.workspace),
        ("together", fit.parts.total),
        ("of the device", plan.target.memory_bytes),
    ):
        table.add_row(f"memory: {what}", format_bytes(size))
    longest = f"{fit.max_context:,} tokens, {_counted(plan.footprint.batch, 'sequence')} at once"
    table.add_row("longest context", longest if fit.max_context else "none")
    largest = f"{_counted(fit.max_batch, 'sequence')} of {fit.context:,} tokens"
    table.add_row("largest batch", largest if fit.max_batch else "none")
    if fit.fits:
        of_trace = "" if load.covered is None else ", by the trace"
        table.add_row("coverage", f"{speed.coverage:.1%} of the routers' choices{of_trace}")
        first, each, resident = map(format_number, (speed.ttft_ms, speed.tpot_ms, speed.tpot_resident_ms))
        table.add_row("first token, at least", f"{first} ms for a prompt of {load.prompt:,} tokens")
        sequences = f"{_counted(load.batch, 'sequence')} of {load.prompt:,} tokens"
        table.add_row("each token, at least", f"{each} ms with {sequences}, most of it for {_BOUNDS[speed.bound]}")
        table.add_row("under `resident`", f"{resident} ms, as it waits for no expert")
    else:
        table.add_row("times", "none: what does not fit takes no steps")
    if plan.meets_slo is not None:
        table.add_row("objectives", "met" if plan.meets_slo else _missed(plan))
    table.add_row("smallest known card", plan.smallest_device or "none")
    console = console or Console()
    console.print(table)
    for line in plan.advice:
        console.print(f"- {line}", markup=False, highlight=False, soft_wrap=True)


_BOUNDS = {
    "memory": "reading memory",
    "products": "computing products",
    "link": "loading experts over the link",
    "overhead": "what a step takes beside",
}


def _missed(plan: Plan) -> str:
    speed, load = plan.speed, plan.load
    if not plan.fit.fits:
        return "missed: it does not fit"
    times = (("first token", speed.ttft_ms, load.ttft_ms), ("each token", speed.tpot_ms, load.tpot_ms))
    late = [(what, wanted) for what, least, wanted in times if wanted is not None and least > wanted]
    return f"missed: {' and '.join(f'{what} in {format_number(wanted)} ms' for what, wanted in late)}"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
