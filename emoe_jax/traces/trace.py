"""A routing trace in memory: read from one `.npz`, validated, sliced by prompt, counted per prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from emoe_jax.errors import EmoeError
from emoe_jax.traces.file_format import read_arrays


class TraceError(EmoeError):
    """A trace file is missing, truncated, of the wrong types or contradicts itself."""


@dataclasses.dataclass(frozen=True)
class RoutingTrace:
    """The router's unfiltered choices for the tokens of `P` prompts in `M` MoE layers of `E` experts, `k` per token.

    Prompts are numbered in arrival order. Tokens need not be sorted: prompts that ran side by side interleave.
    """

    experts: Int[np.ndarray, "tokens M k"]  # uint8 or uint16, best first
    probs: Float[np.ndarray, "tokens M k"]  # the router's weights of these experts
    sample: Int[np.ndarray, " tokens"]  # the token's prompt
    token_pos: Int[np.ndarray, " tokens"]  # the token's position in its sequence
    task: Int[np.ndarray, " P"]  # index into task_names
    task_names: tuple[str, ...]
    num_experts: int
    prompt_embedding: Float[np.ndarray, "P d"] | None = None
    prompt_length: Int[np.ndarray, " P"] | None = None  # tokens before the answer; None: only answers are recorded
    prompt_tokens: Int[np.ndarray, " prompt_tokens"] | None = None  # ids, end to end; lengths are as above
    further_experts: Int[np.ndarray, "tokens M further"] | None = None  # those that rank next, best first
    further_probs: Float[np.ndarray, "tokens M further"] | None = None  # the router's weights of these
    source: str = "trace"  # the file's name, for messages

    @staticmethod
    def load(path: str | Path) -> RoutingTrace:
        """Read and check a trace. Raises `TraceError`, one line, on anything the format does not allow."""
        arrays = read_arrays(Path(path))
        if isinstance(arrays, str):
            raise TraceError(arrays)
        top_k = int(arrays["top_k"])
        if arrays["experts"].shape[2] != top_k:
            raise TraceError(f"{path}: top_k is {top_k} but experts has {arrays['experts'].shape[2]} per token")
        trace = RoutingTrace(
            experts=arrays["experts"],
            probs=arrays["probs"],
            sample=arrays["sample"],
            token_pos=arrays["token_pos"],
            task=arrays["task"],
            task_names=tuple(str(name) for name in arrays["task_names"]),
            num_experts=int(arrays["num_experts"]),
            prompt_embedding=arrays.get("prompt_embedding"),
            prompt_length=arrays.get("prompt_length"),
            prompt_tokens=arrays.get("prompt_tokens"),
            further_experts=arrays.get("further_experts"),
            further_probs=arrays.get("further_probs"),
            source=str(path),
        )
        trace.validate()
        return trace

    def save(self, path: str | Path) -> None:
        """Write the whole trace as one compressed `.npz`."""
        arrays = {name: getattr(self, name) for name in ("experts", "probs", "sample", "token_pos", "task")}
        for name in ("further_experts", "further_probs", "prompt_embedding", "prompt_length", "prompt_tokens"):
            if getattr(self, name) is not None:
                arrays[name] = getattr(self, name)
        with Path(path).open("wb") as file:
            np.savez_compressed(
                file,
                task_names=np.array(self.task_names),
                num_experts=np.int32(self.num_experts),
                top_k=np.int32(self.top_k),
                **arrays,
            )

    @property
    def num_tokens(self) -> int:
        """`N`, over all prompts."""
        return len(self.sample)

    @property
    def num_prompts(self) -> int:
        """`P`. A prompt without recorded tokens counts too."""
        return len(self.task)

    @property
    def num_layers(self) -> int:
        """`M`: MoE layers only."""
        return self.experts.shape[1]

    @property
    def top_k(self) -> int:
        """`k`, the choices per token and layer."""
        return self.experts.shape[2]

    @property
    def ranks(self) -> int:
        """Experts that are known of a token and layer: its choices, and those that rank next."""
        return self.top_k + (0 if self.further_experts is None else self.further_experts.shape[2])

    @property
    def tasks(self) -> list[str]:
        """The task of every prompt, by name."""
        return [self.task_names[index] for index in self.task]

    def describe(self) -> str:
        """The model's shape for messages: `16 MoE layers of 64 experts, top-8`."""
        return f"{self.num_layers} MoE layers of {self.num_experts} experts, top-{self.top_k}"

    def check_model(self, num_layers: int, num_experts: int, top_k: int, what: str) -> None:
        """Raise `TraceError` where `what`, such as a model, is not of this trace's shape."""
        if (num_layers, num_experts, top_k) != (self.num_layers, self.num_experts, self.top_k):
            raise TraceError(
                f"the trace {self.source} is of {self.describe()}; "
                f"{what} has {num_layers} MoE layers of {num_experts} experts, top-{top_k}"
            )

    def rank(self) -> Int[np.ndarray, " tokens"]:
        """Every token's place among its prompt's recorded tokens: 0 for the first."""
        order = np.lexsort((self.token_pos, self.sample))
        lengths = np.bincount(self.sample, minlength=self.num_prompts)
        starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
        rank = np.empty(self.num_tokens, np.int64)
        rank[order] = np.arange(self.num_tokens) - starts
        return rank

    def counts(self, first: int | None = None) -> Int[np.ndarray, "P M E"]:
        """How often each prompt chose each expert: over all its tokens, or over the `first` ones of its answer."""
        chosen = slice(None) if first is None else self._answer_begins(first)
        sample, experts = self.sample[chosen].astype(np.int64), self.experts[chosen]
        shape = (self.num_prompts, self.num_experts)
        counts = np.empty((self.num_prompts, self.num_layers, self.num_experts), np.int32)
        for layer in range(self.num_layers):  # one layer at a time: the flat index of all would be 8 times the trace
            flat = sample[:, None] * self.num_experts + experts[:, layer]
            counts[:, layer] = np.bincount(flat.ravel(), minlength=shape[0] * shape[1]).reshape(shape)
        return counts

    def _answer_begins(self, first: int) -> Bool[np.ndarray, " tokens"]:
        """Which tokens are among the `first` of their answer."""
        rank = self.rank()
        if self.prompt_length is not None:
            of_prompt = self.token_pos < self.prompt_length[self.sample]
            rank = rank - np.bincount(self.sample[of_prompt], minlength=self.num_prompts)[self.sample]
        return (rank >= 0) & (rank < first)

    def select(self, prompts: Sequence[int] | Int[np.ndarray, " n"]) -> RoutingTrace:
        """The trace of these prompts only, renumbered in the order given."""
        wanted = np.asarray(prompts, np.int64)
        if len(wanted) == 0 or wanted.min() < 0 or wanted.max() >= self.num_prompts:
            raise TraceError(
                f"{self.source}: prompts {list(wanted[:4])}... of 0..{self.num_prompts - 1} cannot be taken"
            )
        if len(np.unique(wanted)) != len(wanted):
            raise TraceError(f"{self.source}: a prompt is selected twice")
        place = np.full(self.num_prompts, -1, np.int32)
        place[wanted] = np.arange(len(wanted), dtype=np.int32)
        tokens = np.flatnonzero(place[self.sample] >= 0)
        tokens = tokens[np.argsort(place[self.sample[tokens]], kind="stable")]
        return dataclasses.replace(
            self,
            experts=self.experts[tokens],
            probs=self.probs[tokens],
            further_experts=None if self.further_experts is None else self.further_experts[tokens],
            further_probs=None if self.further_probs is None else self.further_probs[tokens],
            sample=place[self.sample[tokens]],
            token_pos=self.token_pos[tokens],
            task=self.task[wanted],
            prompt_embedding=None if self.prompt_embedding is None else self.prompt_embedding[wanted],
            prompt_length=None if self.prompt_length is None else self.prompt_length[wanted],
            prompt_tokens=self._tokens_of(wanted),
        )

    def tokens_by_prompt(self) -> list[Int[np.ndarray, " tokens"]]:
        """Token ids of every prompt. Raises `TraceError` where the trace does not hold them."""
        if self.prompt_tokens is None or self.prompt_length is None:
            raise TraceError(f"{self.source} does not hold the tokens of its prompts")
        return np.split(self.prompt_tokens, np.cumsum(self.prompt_length)[:-1])

    def _tokens_of(self, prompts: Int[np.ndarray, " n"]) -> Int[np.ndarray, " prompt_tokens"] | None:
        if self.prompt_tokens is None:
            return None
        tokens = self.tokens_by_prompt()
        return np.concatenate([tokens[prompt] for prompt in prompts])

    def without_embedding(self) -> RoutingTrace:
        """The same trace without prompt embeddings. The other arrays are shared, not copied."""
        return dataclasses.replace(self, prompt_embedding=None)

    def validate(self) -> None:
        """Raise `TraceError` where indices are out of range, lengths differ or a value is not finite."""
        for problem in self._problems():
            raise TraceError(f"{self.source}: {problem}")

    def _problems(self) -> Iterator[str]:
        """What is wrong, worst first; what comes later relies on what came before."""
        experts, prompts = self.experts, self.num_prompts
        if self.num_tokens == 0 or prompts == 0:
            yield f"holds {self.num_tokens} tokens of {prompts} prompts; at least one of each is needed"
        if experts.shape[1] == 0 or not 1 <= self.top_k <= self.num_experts:
            yield f"{experts.shape[1]} layers with top-{self.top_k} of {self.num_experts} experts make no routing"
        for name in ("experts", "probs", "token_pos"):
            if len(getattr(self, name)) != self.num_tokens:
                yield f"{name} has {len(getattr(self, name))} tokens, sample has {self.num_tokens}"
        if self.probs.shape != experts.shape:
            yield f"probs has shape {list(self.probs.shape)}, experts {list(experts.shape)}"
        if experts.max() >= self.num_experts:
            yield f"experts reach {experts.max()}; there are only {self.num_experts} (0..{self.num_experts - 1})"
        yield from self._problems_of_further()
        ranked = experts if self.further_experts is None else np.concatenate([experts, self.further_experts], axis=2)
        in_order = np.sort(ranked, axis=2)
        if np.any(in_order[:, :, 1:] == in_order[:, :, :-1]):
            yield "a token names the same expert twice in one layer"
        if self.sample.min() < 0 or self.sample.max() >= prompts:
            yield f"sample reaches from {self.sample.min()} to {self.sample.max()}; there are {prompts} prompts"
        if self.token_pos.min() < 0:
            yield f"token_pos is {self.token_pos.min()} somewhere; positions start at 0"
        if not self.task_names or not all(name.strip() for name in self.task_names):
            yield "task_names is empty or holds an empty name"
        if len(set(self.task_names)) != len(self.task_names):
            yield "task_names holds a name twice"
        if self.task.min() < 0 or self.task.max() >= len(self.task_names):
            yield f"task reaches from {self.task.min()} to {self.task.max()}; there are {len(self.task_names)} tasks"
        for probs in (self.probs, self.further_probs):
            if probs is not None and not np.isfinite(probs).all():
                yield "probs holds values that are not finite"
        if self.prompt_length is not None:
            if len(self.prompt_length) != prompts:
                yield f"prompt_length has {len(self.prompt_length)} entries for {prompts} prompts"
            if self.prompt_length.min() < 0:
                yield f"prompt_length is {self.prompt_length.min()} somewhere; it is a number of tokens"
        if self.prompt_tokens is not None:
            expected = None if self.prompt_length is None else int(self.prompt_length.sum())
            if len(self.prompt_tokens) != expected:
                yield (
                    f"prompt_tokens has {len(self.prompt_tokens)} tokens; prompt_length "
                    + ("is missing" if expected is None else f"adds up to {expected}")
                )
            if self.prompt_tokens.min(initial=0) < 0:
                yield f"prompt_tokens is {self.prompt_tokens.min()} somewhere; token ids start at 0"
        if self.prompt_embedding is not None:
            if self.prompt_embedding.shape[0] != prompts:
                yield f"prompt_embedding has {self.prompt_embedding.shape[0]} rows for {prompts} prompts"
            if self.prompt_embedding.shape[1] == 0 or not np.isfinite(self.prompt_embedding).all():
                yield "prompt_embedding is empty or holds values that are not finite"

    def _problems_of_further(self) -> Iterator[str]:
        """What is wrong with the experts behind the chosen ones."""
        further, probs = self.further_experts, self.further_probs
        if further is None or probs is None:
            if further is not None or probs is not None:
                yield "further_experts and further_probs belong together; one of them is missing"
            return
        if further.shape[:2] != self.experts.shape[:2] or probs.shape != further.shape:
            yield (
                f"further_experts has shape {list(further.shape)} and further_probs {list(probs.shape)}; "
                f"experts has {list(self.experts.shape)}"
            )
        if not self.top_k < self.ranks <= self.num_experts:
            yield f"{self.ranks} ranks of {self.num_experts} experts are told; top-{self.top_k} leaves no others"
        if further.max(initial=0) >= self.num_experts:
            yield f"further_experts reach {further.max()}; there are only {self.num_experts}"
