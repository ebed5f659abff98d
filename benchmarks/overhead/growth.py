"""What a step costs the host as a model gets more layers and more experts: random models of the same small width."""

import contextlib
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from benchmarks.timing import DecodingBatch
from emoe_jax import Engine
from emoe_jax.models import config_from_hf, save_checkpoint
from emoe_jax.models.decoder import Decoder, init_experts

PROMPT = 16  # tokens before decoding starts
SETTLING = 24  # steps before the clock starts, in which the policy's first loads arrive


class Size(NamedTuple):
    """Layers, and experts of each."""

    layers: int
    experts: int


def sizes_up_to(layers: int, experts: int) -> list[Size]:
    """A quarter, a half and all of both, without repeats; each model has at least one layer of eight experts.

    Worked example: 48 layers of 128 experts are measured after 12 of 32 and 24 of 64.
    """
    sizes = [Size(max(1, layers // part), max(8, experts // part)) for part in (4, 2)]
    return list(dict.fromkeys([*sizes, Size(layers, experts)]))


def growth(size: Size, batch: int, steps: int, **options: Any) -> dict[str, Any]:
    """Warm-up, decode steps and the engine's thread of a random Qwen3-MoE with 40 % of its experts resident.

    `warm_up_seconds` are those of compiling without what earlier processes compiled, `warm_up_cpu_seconds` the same of
    all threads on a CPU, which a busy machine changes less. `step_ms` is the median of the clock, `thread_ms` the mean
    of the engine's thread on a CPU, and `parts` where that thread spends its time, in ms per step and largest first.
    Timing the parts is no part of `thread_ms`. `options` of the engine replace the usual ones.
    """
    with tempfile.TemporaryDirectory() as folder, _nothing_compiled():
        write_random_checkpoint(Path(folder), size)
        usual = {"prefix_caching": False, "expert_memory": "40%", "routing": "resident", "audit_rate": 0.0}
        most = PROMPT + 2 * steps + SETTLING + 64
        with Engine.load(folder, max_num_seqs=batch, max_model_len=most, **(usual | options)) as engine:
            began, began_cpu = time.perf_counter(), time.process_time()
            engine.warm_up()
            warm_up, warm_up_cpu = time.perf_counter() - began, time.process_time() - began_cpu
            rng = np.random.default_rng(0)
            prompts = rng.integers(0, engine.config.vocab_size - 1, (batch, PROMPT)).tolist()
            decoding = DecodingBatch(engine, prompts, 2 * steps + SETTLING)
            for _ in range(SETTLING):
                decoding.step()
            wall, thread = [], []
            for _ in range(steps):
                began, began_thread = time.perf_counter(), time.thread_time()
                decoding.step()
                wall.append(time.perf_counter() - began)
                thread.append(time.thread_time() - began_thread)
            parts = _parts(engine, decoding.step, steps)
            decoding.stop()
    return {
        **size._asdict(),
        "batch": batch,
        "warm_up_seconds": warm_up,
        "warm_up_cpu_seconds": warm_up_cpu,
        "step_ms": 1e3 * statistics.median(wall),
        "thread_ms": 1e3 * statistics.mean(thread),
        "parts": parts,
    }


def write_random_checkpoint(directory: Path, size: Size) -> None:
    """A Qwen3-MoE of hidden size 64 with random weights."""
    raw = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 256,
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": size.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": size.experts,
        "num_experts_per_tok": min(8, size.experts // 4),
        "max_position_embeddings": 4096,
        "eos_token_id": 255,
    }
    config = config_from_hf(raw)
    model = Decoder(config, rngs=nnx.Rngs(0))
    save_checkpoint(directory, raw, nnx.state(model), init_experts(config, jax.random.key(0)))


class Stopwatch:
    """CPU time of the calling thread by part. A part's time is without that of the parts within it."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._within: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._note()
        self._within.append(name)
        try:
            yield
        finally:
            self._note()
            self._within.pop()

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Time a method of an object from now on."""
        call: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **keywords: Any) -> Any:
            with self.part(name):
                return call(*args, **keywords)

        setattr(owner, method, timed)

    def _note(self) -> None:
        now = time.thread_time()
        if self._within:
            self.seconds[self._within[-1]] += now - self._since
        self._since = now


def _parts(engine: Engine, step: Callable[[], None], steps: int) -> dict[str, float]:
    """Milliseconds of the engine's thread per step and part, the largest first. The engine is not to be used after."""
    watch, parts = Stopwatch(), engine.parts
    watch.watch(parts.scheduler, "schedule", "schedule")
    watch.watch(parts.scheduler, "update", "book tokens")
    watch.watch(parts.residency, "commit", "commit experts")
    watch.watch(engine.foresight, "before_step", "plan experts")
    watch.watch(engine.foresight, "after_step", "follow wishes")
    watch.watch(engine.loop.dispatcher, "dispatch", "build the batch")
    watch.watch(engine.loop.dispatcher, "collect", "read results")
    watch.watch(parts.runner.executables, "call", "call executables")
    for _ in range(steps):
        with watch.part("everything else"):
            step()
    return {name: 1e3 * seconds / steps for name, seconds in sorted(watch.seconds.items(), key=lambda part: -part[1])}


@contextlib.contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Without executables of earlier processes, which a persistent cache would give, and of earlier sizes."""
    before = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    jax.clear_caches()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
