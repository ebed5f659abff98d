"""One snapshot of the engine's state as Prometheus metrics. What the state lacks is left out."""

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

MAX_TASKS = 64
"""Tasks with metrics of their own, those with the most requests; clients may make up names."""

GAUGES = (
    ("num_requests_running", "Sequences being computed.", "scheduler.running"),
    ("num_requests_waiting", "Sequences that wait.", "scheduler.waiting"),
    ("expert_coverage", "Share of the routers' wishes that were resident, since the start.", "residency.coverage"),
    ("expert_loads_in_flight", "Experts on their way to the device.", "residency.loads.in_flight"),
    ("link_bandwidth_bytes_per_second", "Measured from store to device, staging.", "residency.loads.bandwidth"),
    ("audits_waiting", "Answers that wait for their audit.", "audit.waiting"),
    ("memory_lean", "Whether experts have made room for the KV cache (1).", "memory_trade.lean"),
    ("predictor_open", "Whether predictions count (1), or decayed frequency covers more (0).", "planner.open"),
    ("predict_every", "Prompts that share a prediction at present.", "planner.predict_every"),
)
"""Name, documentation, and where in the state the number is."""

COUNTERS = (
    ("num_preemptions", "Sequences whose pages were taken away.", "scheduler.preemptions"),
    ("prefix_cache_queries", "Tokens looked up in the prefix cache.", "scheduler.prefix_query_tokens"),
    ("prefix_cache_hits", "Those that were there.", "scheduler.prefix_hit_tokens"),
    ("slo_answers", "Answers that had a deadline.", "scheduler.slo.with_slo"),
    ("slo_attained", "Those that kept all of theirs.", "scheduler.slo.attained"),
    ("slo_given_up", "Sequences whose deadlines were given up while they waited.", "scheduler.unattainable"),
    ("answers_not_finite", "Answers ended because the model computed NaN or infinity.", "not_finite"),
    ("engine_steps", "Steps of the engine.", "steps"),
    ("engine_step_seconds", "Time spent in steps.", "step_seconds"),
    ("expert_wait_loads", "Experts that a step waited for.", "residency.loads.waited_loads"),
    ("expert_wait_seconds", "Time that steps waited for them.", "residency.loads.wait_seconds"),
    ("expert_loads", "Experts brought to the device.", "residency.loads.loads"),
    ("expert_loaded_bytes", "Bytes of experts brought to the device.", "residency.loads.loaded_bytes"),
    ("expert_loads_useful", "Loaded in the background and then wished for.", "residency.loads.useful"),
    ("expert_loads_useless", "Loaded in the background and replaced unwished for.", "residency.loads.useless"),
    ("expert_layers_spared", "Exchanges not made: no request is sensitive there.", "residency.loads.layers_spared"),
    ("expert_loads_cancelled", "Given up before they were there.", "residency.loads.cancelled"),
    ("expert_load_failures", "Experts that could not be read.", "residency.loads.failures"),
    ("audits", "Answers computed once more under all experts.", "audit.audits"),
    ("audits_given_up", "For want of time, pages, or because they failed.", "audit.given_up"),
    ("audit_seconds", "Time that audits took.", "audit.seconds"),
    ("memory_trades", "Times that experts and KV cache traded places.", "memory_trade.trades"),
    ("memory_trade_seconds", "Time that it took.", "memory_trade.trade_seconds"),
    ("predictions", "Prompts predicted because it was their turn.", "planner.predictions"),
    ("early_predictions", "Prompts predicted besides, because coverage fell.", "planner.early_predictions"),
    ("prediction_invocations", "Calls of the predictor, each for one prompt or more.", "planner.invocations"),
    ("predictions_missed", "Prompts not asked about, for too many questions waited.", "planner.missed"),
    ("predictions_spared", "Prompts not asked about: no layer is sensitive.", "planner.insensitive"),
    ("prediction_seconds", "Time of the predictor's thread.", "planner.seconds"),
    ("planning_seconds", "Time of planning and following wishes, within steps.", "planner.planning_seconds"),
    ("regret_seconds", "Time of recording and judging what other policies would have covered.", "regret.seconds"),
    ("regret_steps", "Steps that other policies were judged on.", "regret.steps"),
    ("regret_steps_left_out", "Steps that they were not judged on, for lack of time.", "regret.steps_left_out"),
    ("regret_wishes", "Experts that routers wished for in judged steps.", "regret.wishes"),
    ("regret_lookups", "The same, counted once per step, layer and expert.", "regret.lookups"),
)

RIVALS = (
    ("policy_wishes_resident", "Wishes in judged steps that were, or would have been, resident.", "wishes"),
    ("policy_lookups_resident", "The same, counted once per step, layer and expert.", "lookups"),
    ("policy_loads", "Experts that were, or would have been, brought to the device in judged steps.", "loads"),
)
"""Name, documentation, and the number of each policy; `engine` is what was resident."""

AUDITED = (
    ("audit_kl", "KL(all experts || as served) per token, in nats."),
    ("audit_top1_agreement", "Share of tokens of which both have the same most probable one."),
    ("audit_perplexity_ratio", "Expected perplexity over that under all experts."),
)
"""Name, documentation; each by contract, task and estimate: mean, and low and high end of its 95 % interval."""

PLANNER_COVERAGES = ("predicted", "frequency", "promised", "recent")

BY_TASK = (
    (GaugeMetricFamily, "task_substituted_ratio", "Share of expert choices substituted.", "tasks", "substituted"),
    (GaugeMetricFamily, "task_substituted_weight", "The same by router probability.", "tasks", "substituted_weight"),
    (CounterMetricFamily, "task_requests", "Requests that ended.", "tasks", "requests"),
    (CounterMetricFamily, "task_slo_answers", "Answers with a deadline.", "scheduler.slo.tasks", "with_slo"),
    (CounterMetricFamily, "task_slo_attained", "Those that kept it.", "scheduler.slo.tasks", "attained"),
)
"""Kind, name, documentation, where in the state the tasks are, and the number of each."""


def engine_families(state: Mapping[str, Any], model_name: str) -> Iterator[Metric]:
    """The metrics of one `Engine.state()`, each labelled with `model_name`. An empty state has none."""
    for kind, readings in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
        for name, documentation, path in readings:
            yield from _family(kind, name, documentation, model_name, "", {"": _at(state, path)})
    used, pages = _at(state, "scheduler.pages_used"), _at(state, "scheduler.pages")
    usage = used / pages if used is not None and pages else None
    yield from _family(GaugeMetricFamily, "kv_cache_usage_perc", "Share of pages in use.", model_name, "", {"": usage})
    documentation = "Planned bytes by purpose; those of slab and KV cache change places."
    yield from _family(GaugeMetricFamily, "memory_bytes", documentation, model_name, "of", _at(state, "memory") or {})
    documentation = "Of batches that may need absent experts: in one call, once more after a miss, or layer by layer."
    yield from _family(CounterMetricFamily, "forwards", documentation, model_name, "way", _at(state, "forwards") or {})
    yield from _residency(_at(state, "residency") or {}, model_name)
    coverages = {name: _at(state, f"planner.coverage_{name}") for name in PLANNER_COVERAGES}
    documentation = "Of the last prompts by prediction and by frequency; promised by the plan; of recent steps."
    yield from _family(GaugeMetricFamily, "planner_coverage", documentation, model_name, "of", coverages)
    rivals = _at(state, "regret.policies") or {}
    for name, documentation, key in RIVALS:
        values = {policy: numbers.get(key) for policy, numbers in rivals.items()}
        yield from _family(CounterMetricFamily, name, documentation, model_name, "policy", values)
    yield from _audits(_at(state, "audit") or {}, model_name)
    for kind, name, documentation, path, key in BY_TASK:
        tasks = _at(state, path) or {}
        shown = sorted(tasks, key=lambda task: -tasks[task].get("requests", 0))[:MAX_TASKS]
        values = {task: tasks[task][key] for task in shown}
        yield from _family(kind, name, documentation, model_name, "task", values)


def _residency(residency: Mapping[str, Any], model_name: str) -> Iterator[Metric]:
    layers = [str(layer) for layer in residency.get("moe_layers", ())]
    for name, documentation, values in (
        ("experts_resident", "Experts on the device.", map(len, residency.get("experts", ()))),
        ("expert_slots", "Experts that the device has room for.", residency.get("slots", ())),
    ):
        by_layer = dict(zip(layers, values, strict=False))
        yield from _family(GaugeMetricFamily, name, documentation, model_name, "layer", by_layer)
    wishes = {layer: sum(row) for layer, row in zip(layers, residency.get("wishes", ()), strict=False)}
    documentation = "Experts that routers wished for."
    yield from _family(CounterMetricFamily, "expert_wishes", documentation, model_name, "layer", wishes)
    covered = round((residency.get("coverage") or 0) * sum(wishes.values()))
    documentation = "Those of all layers that were resident."
    yield from _family(CounterMetricFamily, "expert_wishes_resident", documentation, model_name, "", {"": covered})


def _audits(audit: Mapping[str, Any], model_name: str) -> Iterator[Metric]:
    """What answers lose, by contract and task, as means and ends of their intervals; and the tuned tolerances."""
    for name, documentation in AUDITED:
        family = GaugeMetricFamily(f"emoe:{name}", documentation, labels=["model_name", "contract", "task", "estimate"])
        for contract, tasks in audit.get("contracts", {}).items():
            for task, numbers in tasks.items():
                for estimate, value in zip(("mean", "low", "high"), numbers[name.removeprefix("audit_")], strict=True):
                    if value is not None:
                        family.add_metric([model_name, contract, task, estimate], value)
        if family.samples:
            yield family
    tolerances = {task: tuned["tolerance"] for task, tuned in (_at(audit, "target.tasks") or {}).items()}
    documentation = "Under which requests are served that name none, tuned to the quality target."
    yield from _family(GaugeMetricFamily, "tolerance", documentation, model_name, "task", tolerances)


def _family(
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
    name: str,
    documentation: str,
    model_name: str,
    label: str,
    values: Mapping[str, float | None],
) -> Iterator[Metric]:
    """One metric, its values by what `label` says; none when there is no value."""
    known = {key: value for key, value in values.items() if value is not None}
    if known:
        family = kind(f"emoe:{name}", documentation, labels=["model_name", *([label] if label else [])])
        for key, value in known.items():
            family.add_metric([model_name, *([key] if label else [])], value)
        yield family


def _at(state: Any, path: str) -> Any:
    """`state["a"]["b"]` for "a.b", None where there is no such thing."""
    for key in path.split("."):
        state = state.get(key) if isinstance(state, Mapping) else None
    return state
