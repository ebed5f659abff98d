"""What requests ask for: tasks drawn uniformly (eMoE section 2) with prompts and answers of the task's lengths."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.serving.arrivals import TraceRow
from emoe_jax.models import load_tokenizer
from emoe_jax.requests.request import SLO
from emoe_jax.scheduling.cost import StepCost


@dataclasses.dataclass(frozen=True)
class Sample:
    """A request of a task without its time: tokens of prompt and answer, and the conversation where there is one."""

    prompt_tokens: int
    output_tokens: int
    messages: tuple[dict[str, str], ...] = ()
    tokens: tuple[int, ...] = ()
    """Of the prompt, where they are known."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One request of a run. `arrival` is in seconds since the run's start."""

    arrival: float
    task: str
    sample: Sample
    slo: SLO
    answer_tokens: int | None = None
    """Tokens of the answer; None where the model ends it."""


Samples = Mapping[str, Sequence[Sample]]


def demo_samples(count: int = 400) -> dict[str, list[Sample]]:
    """Test examples of the bundled demo model's five tasks, with the reference answers' lengths."""
    from serve.options import DEMO_MODEL
    from train.tasks import TASKS, examples

    tokenizer = load_tokenizer(DEMO_MODEL)
    assert tokenizer is not None
    return {
        task: [
            Sample(
                len(tokens := tokenizer.chat(example.messages)),
                len(tokenizer.encode(example.answer)) + 1,  # and the token that ends it
                tuple(example.messages),
                tuple(tokens),
            )
            for example in examples(task, "test", 0, count)
        ]
        for task in TASKS
    }


def trace_samples(traces: Mapping[str, Sequence[TraceRow]]) -> dict[str, list[Sample]]:
    """The requests of recorded traces, one task per trace."""
    return {task: [Sample(row.prompt_tokens, row.output_tokens) for row in rows] for task, rows in traces.items()}


def task_slos(samples: Samples, cost: StepCost, scale: float) -> dict[str, SLO]:
    """Deadlines per task: `scale` times what the task's mean request takes on an idle machine."""
    slos = {}
    for task, rows in samples.items():
        prompt = float(np.mean([sample.prompt_tokens for sample in rows]))
        output = float(np.mean([sample.output_tokens for sample in rows]))
        ttft = cost.seconds(0, prompt, 1)
        latency = ttft + (output - 1) * cost.seconds(1)
        slos[task] = SLO(ttft_ms=1e3 * scale * ttft, latency_ms=1e3 * scale * latency)
    return slos


def drawn(arrivals: Sequence[float], samples: Samples, slos: Mapping[str, SLO], seed: int) -> list[Job]:
    """A job per arrival: its task uniformly, then one of the task's samples."""
    rng = np.random.default_rng(seed)
    tasks = sorted(samples)
    jobs = []
    for arrival in arrivals:
        task = tasks[int(rng.integers(len(tasks)))]
        rows = samples[task]
        jobs.append(Job(arrival, task, rows[int(rng.integers(len(rows)))], slos[task]))
    return jobs


def replayed(traces: Mapping[str, Sequence[TraceRow]], slos: Mapping[str, SLO], speed: float) -> list[Job]:
    """The requests of recorded traces as they came, `speed` times as fast."""
    jobs = [
        Job(row.arrival / speed, task, Sample(row.prompt_tokens, row.output_tokens), slos[task])
        for task, rows in traces.items()
        for row in rows
    ]
    return sorted(jobs, key=lambda job: job.arrival)
