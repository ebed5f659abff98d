"""Against Hugging Face transformers on CPU: `python -m benchmarks.peers --json FILE` (needs the `parity` extra).

Both libraries run the same random Mixtral of about 430 M float32 parameters with KV caches on two threads, ours through
`Engine` with all experts resident in the slab. Repetitions alternate between the two; medians count. transformers gets
the attention and experts implementation that is fastest for it, chosen per workload in the same run.

- `decode_b1`, `decode_b8`: our decode tokens/s over theirs, at batch 1 and 8.
- `prefill_512`: our tokens/s over theirs for a prompt of 512 tokens, first token included.
- `slab_overhead`: what a decode step costs more through slab and slot table than the same forward over stacked weights
  indexed by expert, counting neither wishes nor substitutes (batch 1; a fraction, 0.05 is 5 %).

The floor is the time to read once, at the memory bandwidth of the same run, the weights that a step needs.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int
from rich.console import Console
from rich.table import Table

from benchmarks import timing
from benchmarks.arguments import count
from benchmarks.timing import DecodingBatch
from emoe_jax import Engine, SamplingParams
from emoe_jax.config import ModelConfig
from emoe_jax.device.batch import empty_batch
from emoe_jax.device.inputs import FlatBatch
from emoe_jax.device.kv_cache import KVCache, new_cache
from emoe_jax.device.shapes import Buckets, Shape
from emoe_jax.device.step import Skeleton, whole_step
from emoe_jax.experts.weights import ExpertWeights
from emoe_jax.models import config_from_hf
from emoe_jax.models.decoder import Decoder, init_experts
from emoe_jax.models.rope import Rotation
from emoe_jax.moe import moe_ffn
from emoe_jax.scheduling.pages import pages_for

THREADS = 2
CONTEXT = 544  # a prompt for prefill and its answer
PROMPT = 16  # tokens before decoding starts
DECODE_STEPS = 4  # that are timed, per repetition
_WARM_UP = 2  # calls before the first repetition
MAX_REPETITIONS = (CONTEXT - PROMPT - DecodingBatch.MARGIN - _WARM_UP) // (DECODE_STEPS + 1)
_SETTLE = 0.3  # seconds before a trial: worker threads of the other library spin for a while after its own
PREFILL = 512

MODEL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": CONTEXT,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


class Ours:
    """Our engine: prompts in, then one call per step."""

    name = "eMoE-JAX"

    def __init__(self, checkpoint: Path):
        self._engine = Engine.load(
            checkpoint,
            expert_memory="100%",
            max_model_len=CONTEXT,
            max_num_seqs=8,
            max_num_batched_tokens=PREFILL,
            policy="static",
            prefix_caching=False,
        )

    def start(self, prompts: np.ndarray) -> None:
        """Prefill every prompt; from then on `decode` advances all of them."""
        steps = CONTEXT - prompts.shape[1] - DecodingBatch.MARGIN
        self._batch = DecodingBatch(self._engine, prompts.tolist(), steps)

    def decode(self) -> None:
        self._batch.step()

    def tokens(self) -> list[list[int]]:
        """What each running prompt has generated."""
        return self._batch.tokens()

    def stop(self) -> None:
        self._batch.stop()

    def prefill(self, prompt: np.ndarray) -> int:
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        return self._engine.generate([prompt.tolist()], params)[0].token_ids[0]

    def close(self) -> None:
        self._engine.close()


class Theirs:
    """transformers: greedy decoding by hand, which costs less than `generate`."""

    name = "transformers"
    attention = ("sdpa", "eager")
    experts = ("eager", "grouped_mm", "batched_mm")

    def __init__(self, torch: Any, model: Any):
        self._torch, self._model = torch, model

    def use(self, attention: str, experts: str) -> None:
        self._model.set_attn_implementation(attention)
        self._model.set_experts_implementation(experts)

    def start(self, prompts: np.ndarray) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._model.config)
        self._next = self._torch.from_numpy(prompts).long()
        self._generated: list[list[int]] = [[] for _ in prompts]
        self.decode()

    def decode(self) -> None:
        with self._torch.inference_mode():
            out = self._model(self._next, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self._next = out.logits[:, -1].argmax(-1, keepdim=True)
        for row, token in zip(self._generated, self._next[:, 0].tolist(), strict=True):
            row.append(token)

    def tokens(self) -> list[list[int]]:
        return self._generated

    def stop(self) -> None:
        del self._cache

    def prefill(self, prompt: np.ndarray) -> int:
        self.start(prompt[None])
        return self._generated[0][0]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--repetitions", type=count, default=15, help="per number (default %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.repetitions > MAX_REPETITIONS:
        parser.error(f"--repetitions is {arguments.repetitions}; a context of {CONTEXT} holds {MAX_REPETITIONS}")
    try:
        import torch  # pyright: ignore[reportMissingImports]
        from transformers import MixtralConfig, MixtralForCausalLM
        from transformers.utils import logging
    except ImportError:
        print("benchmarks.peers compares with transformers on torch: pip install 'emoe-jax[parity]'", file=sys.stderr)
        return 2
    if hasattr(os, "sched_setaffinity"):  # XLA takes as many threads as the process may use cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    logging.disable_progress_bar()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**MODEL)).eval()
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        ours, theirs = Ours(Path(directory)), Theirs(torch, model)
        numbers = compare(ours, theirs, arguments.repetitions)
        ours.close()
    numbers["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    del model, ours, theirs
    numbers |= slab_overhead(arguments.repetitions)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(numbers, indent=2) + "\n")
    show(numbers)
    return 0


def compare(ours: Ours, theirs: Theirs, repetitions: int) -> dict[str, Any]:
    """The three ratios, with medians in seconds, the floors, and what transformers was set to."""
    config = config_from_hf(MODEL)
    rng = np.random.default_rng(0)
    numbers: dict[str, Any] = {"read_gb_per_s": read_bandwidth() / 1e9}
    for B in (1, 8):
        tell(f"decode, batch {B}")
        prompts = rng.integers(0, config.vocab_size, (B, PROMPT))

        def trial(prompts: np.ndarray = prompts) -> Callable[[], Any]:
            theirs.start(prompts)
            return theirs.decode

        setting = fastest(theirs, trial, Theirs.experts)
        ours.start(prompts)
        theirs.start(prompts)
        medians = interleave({"ours": ours.decode, "theirs": theirs.decode}, repetitions, DECODE_STEPS)
        numbers |= report(f"decode_b{B}", medians, B, setting)
        numbers[f"decode_b{B}_floor_s"] = step_bytes(config, B) / read_bandwidth()
        numbers[f"decode_b{B}_same_tokens"] = share_equal(ours.tokens(), theirs.tokens())
        ours.stop()
        theirs.stop()
    tell(f"prefill of {PREFILL} tokens")
    prompt = rng.integers(0, config.vocab_size, PREFILL)
    # batched_mm copies an expert per assignment: 25 GB here.
    setting = fastest(theirs, lambda: partial(theirs.prefill, prompt), ("eager", "grouped_mm"))
    runs = {"ours": partial(ours.prefill, prompt), "theirs": partial(theirs.prefill, prompt)}
    return numbers | report(f"prefill_{PREFILL}", interleave(runs, repetitions, 1), PREFILL, setting)


def fastest(theirs: Theirs, prepare: Callable[[], Callable[[], Any]], experts: tuple[str, ...]) -> str:
    """Set transformers to the pair of implementations that is fastest for what `prepare` returns."""

    def seconds(pair: tuple[str, str]) -> float:
        theirs.use(*pair)
        return interleave({"theirs": prepare()}, 3, 1)["theirs"]

    best = min(itertools.product(Theirs.attention, experts), key=seconds)
    theirs.use(*best)
    return f"attention {best[0]}, experts {best[1]}"


def interleave(runs: dict[str, Callable[[], Any]], repetitions: int, steps: int) -> dict[str, float]:
    """Median seconds per call of each, in turns, after a warm-up. Each turn begins with a call that is not timed."""
    for run in runs.values():
        for _ in range(_WARM_UP):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions):
        for name, run in runs.items():
            time.sleep(_SETTLE)
            seconds[name].append(timing.per_call(run, steps).wall)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(name: str, medians: dict[str, float], tokens: int, setting: str) -> dict[str, Any]:
    return {
        name: medians["theirs"] / medians["ours"],
        f"{name}_ours_s": medians["ours"],
        f"{name}_theirs_s": medians["theirs"],
        f"{name}_ours_tokens_per_s": tokens / medians["ours"],
        f"{name}_theirs_tokens_per_s": tokens / medians["theirs"],
        f"{name}_theirs_setting": setting,
    }


def share_equal(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of positions at which both generated the same token. A near tie may part them for good."""
    pairs = [pair for mine, other in zip(ours, theirs, strict=True) for pair in zip(mine, other, strict=False)]
    return sum(mine == other for mine, other in pairs) / len(pairs)


def step_bytes(config: ModelConfig, B: int) -> float:
    """Weights that a decode step of `B` sequences reads, for independent uniform routing."""
    active = config.num_experts * (1 - (1 - config.top_k / config.num_experts) ** B)
    heads = config.num_heads + 2 * config.num_kv_heads
    attention = config.hidden_size * config.head_dim * (heads + config.num_heads)
    layer = attention + config.hidden_size * config.num_experts + active * config.expert_params
    return 4 * (config.num_layers * layer + config.vocab_size * config.hidden_size)


def read_bandwidth() -> float:
    """Bytes per second at which one thread reads memory, best of a few: two read no faster on most machines."""
    array = np.ones(64 << 20, np.float32)

    def seconds() -> float:
        started = time.perf_counter()
        array.max()
        return time.perf_counter() - started

    return array.nbytes / min(seconds() for _ in range(7))


@partial(jax.jit, static_argnames=("skeleton", "config", "shape"), donate_argnames=("cache",))
def plain_step(
    leaves: tuple[Array, ...],
    experts: tuple[ExpertWeights, ...],
    cache: KVCache,
    inputs: Int[Array, " words"],
    *,
    skeleton: Skeleton,
    config: ModelConfig,
    shape: Shape,
) -> tuple[KVCache, Array]:
    """`whole_step` without a slab: expert `e` is row `e` of the stacked weights, and nothing is counted."""
    model: Decoder = skeleton.join(leaves)
    batch = FlatBatch.unpack(inputs, shape)
    x, rotation = model.embed(jnp.asarray(batch.inputs.tokens)[None]), Rotation.of(batch.positions[None], config)
    new: list[Any] = []
    for index, (layer, weights) in enumerate(zip(model.layers, experts, strict=True)):
        attend_fn = batch.attend_function(config, None, cache[index])
        x, layer_cache = layer.attention(x, rotation, attend_fn)
        new.append(layer_cache)
        rows, routing = layer.moe_input(x, None, batch.valid)
        slots = jnp.arange(config.num_experts, dtype=jnp.int32)
        x = layer.moe_output(x, rows, moe_ffn(rows, routing.ids, routing.weights, slots, weights, config))
    return tuple(new), model.logits(batch.last_hidden(x))


def slab_overhead(repetitions: int) -> dict[str, Any]:
    """Both steps over the same weights and a slot table in random order, at batch 1."""
    tell("slab overhead")
    config = config_from_hf(MODEL)
    skeleton, leaves = Skeleton.split(Decoder(config, rngs=nnx.Rngs(0)))
    experts = init_experts(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    table: Int[np.ndarray, "M E"] = np.stack([rng.permutation(config.num_experts) for _ in experts]).astype(np.int32)
    pages = pages_for(CONTEXT)
    batch = empty_batch(Buckets.of(1, 1, CONTEXT).fit(1))
    inputs = batch.inputs
    inputs.tokens[:], inputs.starts[:], inputs.lengths[:] = 7, PROMPT, 1
    inputs.block_tables[:] = 1 + np.arange(pages, dtype=np.int32)
    kept = np.zeros(1, np.int32)
    statics = {"skeleton": skeleton, "config": config, "shape": batch.shape}
    caches = {name: new_cache(config, pages + 1, "float32") for name in ("slab", "plain")}

    def run_slab() -> None:
        arguments = (leaves, experts, table, caches["slab"], batch.words, kept)
        caches["slab"], out = whole_step(*arguments, **statics)
        jax.device_get((out.logits, out.report))

    def run_plain() -> None:
        caches["plain"], logits = plain_step(leaves, experts, caches["plain"], batch.words, **statics)
        jax.device_get(logits)

    medians = interleave({"slab": run_slab, "plain": run_plain}, 3 * repetitions, DECODE_STEPS)
    return {
        "slab_overhead": medians["slab"] / medians["plain"] - 1,
        "slab_step_s": medians["slab"],
        "plain_step_s": medians["plain"],
    }


def tell(stage: str) -> None:
    print(f"{stage} ...", file=sys.stderr, flush=True)


def show(numbers: dict[str, Any]) -> None:
    table = Table(
        title=f"Mixtral of {numbers['parameters'] / 1e6:.0f} M parameters, float32, {THREADS} threads, medians"
    )
    for column in ("", "ours", "transformers", "ratio", "floor", "transformers used"):
        table.add_column(column, justify="left" if column in ("", "transformers used") else "right")
    for name, label in (
        ("decode_b1", "decode, batch 1"),
        ("decode_b8", "decode, batch 8"),
        (f"prefill_{PREFILL}", "prefill"),
    ):
        floor = numbers.get(f"{name}_floor_s")
        table.add_row(
            label,
            *(
                f"{numbers[f'{name}_{who}_s'] * 1e3:.1f} ms, {numbers[f'{name}_{who}_tokens_per_s']:.1f} tokens/s"
                for who in ("ours", "theirs")
            ),
            f"{numbers[name]:.2f}x",
            "" if floor is None else f"{floor * 1e3:.1f} ms",
            numbers[f"{name}_theirs_setting"],
        )
    console = Console()
    console.print(table)
    console.print(
        f"slab overhead {numbers['slab_overhead']:+.1%} ({numbers['slab_step_s'] * 1e3:.1f} ms against "
        f"{numbers['plain_step_s'] * 1e3:.1f} ms per step); memory reads at {numbers['read_gb_per_s']:.1f} GB/s"
    )


if __name__ == "__main__":
    sys.exit(main())
