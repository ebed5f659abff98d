"""Residency policies in the engine, on the demo model's test prompts: what answers lose, and how fast they come."""

from __future__ import annotations

import contextlib
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from emoe_jax import Engine, RequestOutput, SamplingParams
from emoe_jax.engine_config import PolicyName
from emoe_jax.models import config_from_directory
from emoe_jax.policies import make_policy
from emoe_jax.residency.knowledge import RoutingKnowledge
from train.prompts import Prompt
from train.tasks import TASKS, examples
from train.tasks.example import Example

EXACT_TASKS = ("clsfy", "comp", "qa")
BATCHES = (1, 16)
_ANSWER_TOKENS = 64
_DECODE_STEPS = 96
_SWITCH_PROMPTS = 80  # of each task
_CONTEXT = 512  # tokens that an engine is loaded for

Report = Callable[[str], None]
Save = Callable[[dict[str, Any]], None]


def measure_live(
    model: str,
    shares: Sequence[float],
    policies: Sequence[str],
    per_task: int,
    repetitions: int,
    switch_share: float,
    report: Report,
    save: Save,
) -> dict[str, Any]:
    """`live` is of the first policy, by share of resident experts; `live_policies` has all of them by name.

    Ratios are to an engine with all experts resident that runs in the same process, in turns. `save` is called after
    every cell with what there is, and the topic switch comes last.
    """
    check_policies(model, policies)
    by_policy: dict[str, dict[str, Any]] = {policy: {} for policy in policies}
    results: dict[str, Any] = {"live": by_policy[policies[0]], "live_policies": by_policy}
    with engine_of(model, 1.0, "static") as full:
        report("all experts resident")
        reference = answers(full, per_task)
        by_policy["full"] = {"1": reference}
        save(results)
        cells = [(policy, share) for policy in policies for share in shares]
        began = time.monotonic()
        for done, (policy, share) in enumerate(cells):
            report(f"cell {done + 1} of {len(cells)}: {policy}, {share:.0%} resident{_left(began, done, len(cells))}")
            with engine_of(model, share, policy) as engine:
                cell = answers(engine, per_task)
                cell["perplexity_ratio"] = cell["perplexity"] / reference["perplexity"]
                cell |= decode_ratios(full, engine, repetitions)
                cell |= host_share(engine)
            by_policy[policy][f"{share:g}"] = cell
            save(results)
    report(f"topic switch, {policies[0]}, {switch_share:.0%} resident")
    results["topic_switch"] = topic_switch(model, switch_share, policies[0])
    save(results)
    return results


def check_policies(model: str, policies: Sequence[str]) -> None:
    """Raise `ConfigError` where one of them needs what the checkpoint has not, before hours have gone into others."""
    directory = Path(model)
    config = config_from_directory(directory)
    known = RoutingKnowledge.load(directory, config, "auto", "auto").for_policies()
    for policy in policies:
        make_policy(policy, len(config.moe_layers), config.num_experts, None, known)


def _left(began: float, done: int, total: int) -> str:
    """How long the rest takes if it goes on like this; nothing before the first cell."""
    if not done:
        return ""
    each = (time.monotonic() - began) / done
    return f" ({each:.0f} s per cell, {each * (total - done) / 60:.0f} min left)"


@contextlib.contextmanager
def engine_of(model: str, share: float, policy: str) -> Iterator[Engine]:
    """A warm engine with this share of the experts resident."""
    with Engine.load(
        model,
        expert_memory=f"{100 * share:g}%",
        policy=cast(PolicyName, policy),  # the engine's options check it
        routing="resident",
        audit_rate=0.0,
        max_num_seqs=max(BATCHES),
        max_model_len=_CONTEXT,
        prefix_caching=False,
    ) as engine:
        engine.warm_up()
        yield engine


def answers(engine: Engine, per_task: int) -> dict[str, Any]:
    """Greedy answers to test prompts of all tasks in one random order of arrival, and the reference answers' odds."""
    drawn = _test_examples(per_task)
    began = time.perf_counter()
    outputs = engine.generate(
        [_prompt_ids(engine, example) for example in drawn], SamplingParams(max_tokens=_ANSWER_TOKENS, temperature=0)
    )
    seconds = time.perf_counter() - began
    right = {task: [] for task in EXACT_TASKS}
    for example, output in zip(drawn, outputs, strict=True):
        if example.task in right:
            right[example.task].append(output.text.strip() == example.answer)
    state = engine.state()
    return {
        "exact_match": {task: statistics.mean(found) for task, found in right.items()},
        "perplexity": math.exp(statistics.mean(_nats(engine, drawn))),
        "substituted": _substituted(outputs),
        "by_task": state["tasks"],
        "coverage": state["residency"]["coverage"],
        "loads": state["residency"]["loads"],
        "slots": state["residency"]["slots"],
        "planner": state["planner"],
        "answer_tokens_per_second": sum(len(output.token_ids) for output in outputs) / seconds,
    }


def decode_ratios(full: Engine, engine: Engine, repetitions: int) -> dict[str, float]:
    """Decoded tokens per second over those of the full engine, by batch: medians of runs that take turns."""
    ratios = {}
    for batch in BATCHES:
        pairs = []
        for repetition in range(repetitions):
            pair = [decode_seconds(each, batch, repetition) for each in (full, engine)]
            pairs.append(pair[0] / pair[1])
        ratios[f"decode_ratio_b{batch}"] = statistics.median(pairs)
    return ratios


def decode_seconds(engine: Engine, batch: int, seed: int) -> float:
    """Median seconds of a step in which every one of `batch` prompts decodes a token."""
    drawn = _test_examples(batch)[seed % 5 :][:batch]
    params = SamplingParams(max_tokens=_DECODE_STEPS, temperature=0, ignore_eos=True)
    names = [f"decode-{index}" for index in range(batch)]
    for name, example in zip(names, drawn, strict=True):
        engine.add_request(name, _prompt_ids(engine, example), params)
    steps = []
    while engine.has_work():
        began = time.perf_counter()
        deltas = engine.step()
        if len(deltas) == batch:
            steps.append(time.perf_counter() - began)
    for name in names:
        engine.pop(name)
    return statistics.median(steps[1:])


def host_share(engine: Engine) -> dict[str, float]:
    """Planning, predicting and committing, as shares of the seconds that the engine spent in steps."""
    state = engine.state()
    seconds = max(state["step_seconds"], 1e-9)
    planner = state["planner"]
    spent = {
        "planning_share": planner["planning_seconds"],
        "prediction_share": planner.get("seconds", 0.0),
        "commit_share": state["residency"]["loads"]["commit_seconds"],
    }
    return {name: value / seconds for name, value in spent.items()}


def topic_switch(model: str, share: float, policy: str) -> dict[str, Any]:
    """One prompt after another of one task, then as many of another: coverage by prompt, and how soon it is back.

    `prompts_to_recover`: after how many the mean coverage of five prompts reaches 95 % of the second task's steady
    state, the mean over its last half; None if it does not.
    """
    first, second = "qa", "conv"
    params, prompts = SamplingParams(max_tokens=_ANSWER_TOKENS, temperature=0), _SWITCH_PROMPTS
    with engine_of(model, share, policy) as engine:
        curve = []
        for task in (first, second):
            for example in examples(task, "test", 1, prompts):
                output = engine.generate([_prompt_ids(engine, example)], params)[0]
                curve.append(1 - output.substituted)
    after = curve[prompts:]
    steady = statistics.mean(after[prompts // 2 :])
    means = [statistics.mean(after[index : index + 5]) for index in range(prompts - 4)]
    recovered = next((index for index, mean in enumerate(means) if mean >= 0.95 * steady), None)
    return {
        "from": first,
        "to": second,
        "residency": share,
        "prompts_of_each": prompts,
        "steady_coverage": steady,
        "prompts_to_recover": recovered,
        "coverage_by_prompt": curve,
    }


def _test_examples(per_task: int) -> list[Example]:
    drawn = [example for task in TASKS for example in examples(task, "test", 0, per_task)]
    random.Random(0).shuffle(drawn)
    return drawn


def _prompt_ids(engine: Engine, example: Example) -> list[int]:
    assert engine.tokenizer is not None
    return Prompt(example.task, tuple(example.messages)).token_ids(engine.tokenizer)


def _nats(engine: Engine, drawn: Sequence[Example]) -> list[float]:
    """Nats of every token of the reference answers, read as part of the prompt while other requests run beside."""
    assert engine.tokenizer is not None
    prompts, lengths = [], []
    for example in drawn:
        prompt = _prompt_ids(engine, example)
        answer = engine.tokenizer.encode(example.answer, add_special_tokens=False)
        prompts.append(prompt + answer)
        lengths.append(len(answer))
    outputs = engine.generate(prompts, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0))
    nats = []
    for output, length in zip(outputs, lengths, strict=True):
        assert output.prompt_logprobs is not None
        nats += [-token.logprob for token in output.prompt_logprobs[-length:]]
    return nats


def _substituted(outputs: Sequence[RequestOutput]) -> float:
    return statistics.mean(output.substituted for output in outputs)
