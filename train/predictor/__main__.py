"""`python -m train.predictor`: train the expert predictor on a routing trace, or judge one on a trace."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from rich.console import Console

from emoe_jax.errors import EmoeError, one_line, require
from emoe_jax.policies.dynamics import DYNAMICS_FILE
from emoe_jax.policies.learning import learn_transitions
from emoe_jax.policies.transitions import TRANSITIONS_FILE, save_transitions
from emoe_jax.predictor import Predictor, PredictorConfig, PredictorError, Prompts
from emoe_jax.predictor.network import Weights
from emoe_jax.predictor.predictor import CONFIG
from emoe_jax.predictor.prompts import shuffled_order
from emoe_jax.traces import RoutingTrace
from train.predictor import evaluate, examples, options, report, trainer
from train.predictor.answers import learn_answers
from train.predictor.trainer import Checkpoints, Hyperparameters, StepReport
from train.progress import RunHistory, progress_bar, read_history

_LOG_EVERY = 25


def main(argv: list[str] | None = None) -> None:
    given = options.arguments(argv)
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        numbers = judge(given) if given.evaluate else train(given, console)
        report.print_evaluation(numbers, console)
        if given.json:
            report.write_json(numbers, given.json)
    except (EmoeError, ImportError, OSError) as error:
        _fail(one_line(error))


def judge(given: argparse.Namespace) -> dict[str, Any]:
    """The numbers of the predictor in `--evaluate` on the trace."""
    predictor = Predictor.load(given.evaluate)
    trace = RoutingTrace.load(given.traces)
    prompts = evaluate.prompts_of(trace, predictor)
    answers = evaluate.answers_of(given.evaluate, trace)
    return evaluate.evaluate(predictor, prompts, updates=not given.no_updates, seed=given.seed, answers=answers)


def train(given: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Train up to the end, write the predictor to `--out`, and return its numbers on the held-out prompts."""
    plots = _wants_plots(given.plots, console)
    out: Path = given.out
    trace = RoutingTrace.load(given.traces)
    config = PredictorConfig(
        num_layers=trace.num_layers,
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        embedding_dim=0 if trace.prompt_embedding is None else trace.prompt_embedding.shape[1],
        variant=given.variant,
        arch=given.arch,
        width=given.width,
        members=given.members,
        first_tokens=given.first_tokens,
        token_runs=given.token_runs,
    )
    prompts = Prompts.of(trace, config.first_tokens).routed()
    if given.shuffle_labels:
        prompts = prompts.shuffled(given.seed)
    split = examples.HeldOutSplit.draw(prompts, given.held_out, given.seed)
    plan = Hyperparameters(
        options.steps(given, len(split.train)),
        given.seed,
        peak_rate=given.rate,
        held_out=given.held_out,
        shuffled=given.shuffle_labels,
    )
    claim(out, config, plan, prompts)
    console.print(f"{config.describe()}: {len(split.train)} prompts to train on, {len(split.held_out)} held out")
    routed = trace.select(np.flatnonzero(np.bincount(trace.sample, minlength=trace.num_prompts)))
    if given.shuffle_labels:
        routed = routed.select(shuffled_order(len(prompts), given.seed))
    readable = None if given.shuffle_labels else routed
    predictor, training, held_out = examples.prepare(prompts, split, config, readable)
    before = trainer.prior_coverage(held_out)
    state = _run(predictor, training, held_out, plan, out, before, console)
    improved = float(state.best_coverage) - before
    # What the finished predictor remembers decides its dynamics; those that are judged know the training prompts only.
    say = functools.partial(console.print, style="dim")
    remembered = split.train[-len(predictor.memory) :]
    dynamics = learn_answers(
        routed.select(remembered), predictor.prior(with_first=False).left_out(), seed=given.seed, report=say
    )
    config, best = _kept(config, state)
    judged = Predictor(config, predictor.trained, best, predictor.memory, predictor.layers, predictor.tokens)
    numbers = evaluate.evaluate(
        judged,
        prompts.take(split.held_out),
        baselines_from=prompts.take(split.train),
        answers=evaluate.Answers(routed.select(split.held_out), dynamics),
    )
    finished, _ = examples.closed_forms(prompts, np.arange(len(prompts)), config, readable)
    finished.weights = best
    finished.save(out)
    dynamics.save(out / DYNAMICS_FILE)
    save_transitions(out / TRANSITIONS_FILE, learn_transitions(trace))
    if plots:
        report.plot(read_history(out / "history.jsonl"), before, out / "curves.png")
    numbers |= {
        "best_step": int(state.best_step),
        "held_out_gain_over_prior": improved,
        "plan": dataclasses.asdict(plan),
    }
    report.write_json(numbers, out / "metrics.json")
    if config.members:
        found = f"step {int(state.best_step)} was best, {improved:+.4f} mean coverage over closed forms alone"
    else:
        found = "no networks, which did not cover more than closed forms alone"
    console.print(f"wrote {out}: {found}")
    return numbers


def _wants_plots(asked: bool | None, console: Console) -> bool:
    """Whether curves are drawn: as asked, else where matplotlib is installed, and the run says where it is not.

    Raises `ModuleNotFoundError` before any work where curves are asked for and cannot be drawn.
    """
    if asked is False:
        return False
    try:
        require("matplotlib")
    except ModuleNotFoundError as missing:
        if asked:
            raise
        console.print(f"no curves.png: {one_line(missing)}", markup=False)
        return False
    return True


def _run(
    predictor: Predictor,
    training: examples.Examples,
    held_out: examples.Examples,
    plan: Hyperparameters,
    out: Path,
    before: float,
    console: Console,
) -> trainer.TrainState:
    checkpoints = Checkpoints(out / "checkpoints")
    first = max(checkpoints.steps(), default=0)
    history = RunHistory(out / "history.jsonl", first)
    began = time.monotonic()
    with progress_bar(console, "step") as bar:
        task = bar.add_task("compiling", total=plan.steps, completed=first)
        text = ""

        def show(progress: StepReport) -> None:
            nonlocal text
            history.add(progress._asdict())
            if progress.coverage is not None:
                text = f"coverage {progress.coverage:.4f} (prior {before:.4f}, best {progress.best_coverage:.4f})"
            bar.update(task, completed=progress.step, description=f"loss {progress.loss:.4f}  {text}")
            if not console.is_terminal and progress.step % _LOG_EVERY == 0:
                seconds = time.monotonic() - began
                console.print(f"step {progress.step}/{plan.steps}  loss {progress.loss:.4f}  {text}  {seconds:.0f} s")

        try:
            return trainer.run(predictor, training, held_out, plan, checkpoints, show)
        finally:
            history.close()


def _kept(config: PredictorConfig, state: trainer.TrainState) -> tuple[PredictorConfig, Weights]:
    """The networks that are worth asking: none where closed forms alone covered most of the held-out prompts."""
    if int(state.best_step):
        return config, state.best
    return dataclasses.replace(config, members=0), {name: leaf[:0] for name, leaf in state.best.items()}


def claim(out: Path, config: PredictorConfig, plan: Hyperparameters, prompts: Prompts) -> None:
    """Mark the directory as this run's; refuse one that holds a predictor of another model, trace or plan."""
    if (out / CONFIG).exists():
        held = PredictorConfig.load(out / CONFIG)
        held.check_model(config.num_layers, config.num_experts, config.top_k, "the trace")
    digest = hashlib.sha256()
    for array in (np.array(prompts.tasks), prompts.embedding, prompts.counts, prompts.first):
        digest.update(np.ascontiguousarray(array).tobytes())
    described = json.dumps(
        {"config": config.to_json(), "plan": dataclasses.asdict(plan), "prompts": digest.hexdigest()}, indent=1
    )
    path = out / "run.json"
    if path.exists() and path.read_text() != described:
        raise PredictorError(
            f"{out} holds a run on another trace or with other options (see {path}); choose another --out or remove it"
        )
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(described)


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
