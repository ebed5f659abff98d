"""What the next step computes: continuous batching with chunked prefill under a token budget. Pure Python.

    plan = scheduler.schedule(now)
    result = runner.run(plan)
    finished = scheduler.update(plan, result)

After `dispatched(plan)` the next step may be scheduled while this one runs. Its plan assumes that a sequence
ends only by reaching its length. The next step's `update` drops the tokens of a sequence that ended otherwise.

Every running sequence that decodes is in every plan, unless its grammar still computes what may come next. What is left
of the token budget goes to prompts, oldest first, at most `prefill_chunk` tokens each, so that a long prompt neither
stalls decoding nor blocks the prompts behind it.
The oldest running sequence always advances (the pool holds at least one sequence of full length and only later ones
are preempted), so every sequence finishes.
"""

from bisect import insort
from collections import deque
from collections.abc import Collection
from typing import Any

from emoe_jax.errors import CapacityError, ConfigError, RequestError
from emoe_jax.requests.request import FinishReason
from emoe_jax.requests.sequence import Sequence, SequenceStatus
from emoe_jax.scheduling.attainment import Attainment
from emoe_jax.scheduling.pages import PagePool
from emoe_jax.scheduling.plan import PrefillChunk, StepPlan, StepResult
from emoe_jax.scheduling.policy import AdmissionPolicy, FcfsPolicy
from emoe_jax.scheduling.prefix_cache import PrefixCache


class Scheduler:
    """Owns all sequences from `add` to their end, and their pages. The policy says which starts next.

    When pages run out, the latest sequence is preempted: it goes back to the front of the queue with its tokens kept,
    and is prefilled again. With `prefix_caching` a sequence that starts takes over the pages of its longest prefix that
    was computed before, its own before a preemption included. Pages that are only kept for that count as free. A
    sequence waits for pages that a running one is computing: of sequences that come together with one prompt, as those
    of `n` > 1 do, the first computes its full pages and the others only the tokens beyond them.

    Raises `ConfigError` when the step's token budget cannot hold a token of every running sequence, and
    `CapacityError` when the pool cannot hold one sequence of `max_model_len` tokens.
    """

    def __init__(
        self,
        pool: PagePool,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        prefill_chunk: int,
        eos_token_ids: Collection[int] = (),
        policy: AdmissionPolicy | None = None,
        prefix_caching: bool = False,
    ):
        for name, value in (("max_num_seqs", max_num_seqs), ("prefill_chunk", prefill_chunk)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if max_model_len < 2:
            raise ConfigError(f"max_model_len is {max_model_len}; a prompt and an answer need at least 2 tokens")
        if max_num_batched_tokens < max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({max_num_batched_tokens}) is below max_num_seqs ({max_num_seqs}); "
                "a step must have room for one token of every running sequence"
            )
        if pool.num_usable < pool.needed(max_model_len):
            raise CapacityError(
                f"the KV cache has {pool.num_usable} pages of {pool.page_size} tokens; one sequence of "
                f"max_model_len {max_model_len} needs {pool.needed(max_model_len)}"
            )
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.prefill_chunk = prefill_chunk
        self.policy: AdmissionPolicy = FcfsPolicy() if policy is None else policy
        self.eos_token_ids = frozenset(eos_token_ids)
        self.prefix_cache = PrefixCache(pool, prefix_caching)
        self.num_preemptions = 0
        self.num_short_steps = 0
        """Steps in which a sequence was preempted, or could not start, for want of pages."""
        self.attainment = Attainment()
        self._now = 0.0  # end of the last step
        self._next_order = 0
        self._running: list[Sequence] = []  # by order of arrival
        self._in_flight: deque[StepPlan] = deque()  # dispatched and not updated, oldest first
        self._requests: dict[str, list[Sequence]] = {}

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue, preempted ones included."""
        return len(self.policy)

    @property
    def num_running(self) -> int:
        """Sequences that were started and neither ended nor were preempted since."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(len(self.policy) or self._running)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Admitted sequences, oldest first."""
        return tuple(self._running)

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """Queued sequences, those that came first first."""
        return self.policy.waiting

    def line(self, now: float, count: int) -> list[Sequence]:
        """The first `count` of those that wait, in the order in which they will probably start."""
        return self.policy.next_up(count, now)

    def use_policy(self, policy: AdmissionPolicy) -> None:
        """Admit by another policy from now on. Raises `ValueError` when sequences wait in the old one's queue."""
        if len(self.policy):
            raise ValueError(f"{len(self.policy)} sequences wait; the policy can be changed when none does")
        self.policy = policy

    def state(self) -> dict[str, Any]:
        """Queue, pages, attainment of deadlines and what the policy goes by, as JSON-able values."""
        return {
            "policy": self.policy.name,
            "waiting": self.num_waiting,
            "running": self.num_running,
            "preemptions": self.num_preemptions,
            "pages_used": self.pool.num_used,
            "pages": self.pool.num_usable,
            **self.prefix_cache.state(),
            "slo": self.attainment.state(),
            **self.policy.state(),
        }

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. Raises `RequestError` for an empty prompt or one that leaves no room for an answer."""
        length = len(sequence.prompt_token_ids)
        if length == 0:
            raise RequestError("the prompt is empty; at least one token is needed", param="prompt")
        if length >= self.max_model_len:
            raise RequestError(
                f"the prompt has {length} tokens; at most {self.max_model_len - 1} leave room for an answer within "
                f"the maximum length of {self.max_model_len}",
                param="prompt",
                code="context_length_exceeded",
            )
        if sequence.order != -1:
            raise ValueError(f"sequence {sequence.request_id}/{sequence.index} was added before")
        self.prefix_cache.expect(sequence)
        self.policy.add(sequence, self._running)
        sequence.order = self._next_order
        self._next_order += 1
        self._requests.setdefault(sequence.request_id, []).append(sequence)

    def abort(self, request_id: str) -> list[Sequence]:
        """End all sequences of a request at once; returns those that were still alive (none for an unknown id).

        Allowed while a plan is in flight: its tokens for them are dropped by `update`.
        """
        sequences = list(self._requests.get(request_id, ()))
        for sequence in sequences:
            self.finish(sequence, "abort")
        return sequences

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence from outside (a stop string, an abort, an error) and free its pages.

        On a sequence that has just finished by itself only the reason changes: a stop string may end where the
        length limit strikes too.
        """
        if not sequence.finished:
            if sequence.status is SequenceStatus.RUNNING:
                self._running.remove(sequence)
            else:
                self.policy.remove(sequence)
            self._release(sequence)
            if reason == "stop":
                self._book(sequence)
        sequence.finish_reason = reason

    def schedule(self, now: float) -> StepPlan:
        """Plan one step at time `now` (seconds): allocates the pages it writes; preempts and admits as needed."""
        decodes: list[Sequence] = []
        prefills: list[PrefillChunk] = []
        running, pool = self._running, self.pool
        page_size = pool.page_size
        prefill_budget = self.max_num_batched_tokens - sum(1 for sequence in running if sequence.decodes)
        preempted = False
        index = 0
        while index < len(running):  # oldest first; preemption shortens the list from its end
            sequence = running[index]
            index += 1
            if sequence.num_pending and self._is_full(sequence):
                continue  # it ends with the token that it waits for
            if sequence.held:
                continue
            start, total = sequence.num_computed, sequence.num_tokens
            is_decode = sequence.decodes
            length = 1 if is_decode else min(total - start, self.prefill_chunk, prefill_budget)
            if length == 0:
                continue
            missing = -(-(start + length) // page_size) - len(sequence.pages)
            if missing > 0:
                while not pool.can_allocate(missing) and len(running) >= index:
                    self._preempt(running[-1])
                    preempted = True
                if len(running) < index:  # it was the latest itself
                    break
                sequence.pages += pool.allocate(missing)
            if is_decode:
                decodes.append(sequence)
            else:
                prefill_budget -= length
                prefills.append(PrefillChunk(sequence, start, length, start + length == total))
        self.num_short_steps += preempted
        if not preempted and len(self.policy):
            self._admit(prefills, prefill_budget, now)
        return StepPlan(tuple(decodes), tuple(prefills), now)

    def dispatched(self, plan: StepPlan) -> None:
        """A plan is being computed: its tokens count as computed from now on, and those it samples as pending.

        For `schedule` before `update`; plans are updated in the order in which they were dispatched.
        """
        self._in_flight.append(plan)
        for sequence in plan.decodes:
            sequence.num_computed += 1
            sequence.num_pending += 1
        for chunk in plan.prefills:
            chunk.sequence.num_computed += chunk.length
            chunk.sequence.num_pending += chunk.is_last

    def update(
        self,
        plan: StepPlan,
        result: StepResult,
        seconds: float | None = None,
        *,
        waited: float = 0.0,
        ended: float | None = None,
    ) -> list[Sequence]:
        """Book a step: append its tokens, free the pages of sequences that ended, and return these.

        `seconds` is what the step took, from `schedule` or from the end of the step before on; policies learn from it.
        None where it was not measured. `waited` of them went into waiting for loads. `ended` is when the step was over,
        by default `seconds` after `schedule`.

        Token conditions end a sequence here: "stop" for an end-of-sequence or stop token (kept as the last token),
        "length" for `max_tokens` and `max_model_len`. A sequence whose numbers are not finite ends with "error", and
        the pages that the step wrote for it are not published. Sequences that ended while the plan was in flight are
        skipped.
        """
        if not self._in_flight:
            self.dispatched(plan)
        if self._in_flight.popleft() is not plan:
            raise ValueError("steps are updated in the order in which they were dispatched")
        if seconds is not None:
            self.policy.observe(plan, max(0.0, seconds - waited), waited)
        self._now = plan.now + (seconds or 0.0) if ended is None else ended
        finished: list[Sequence] = []
        sampled = result.sampled
        for sequence in plan.sequences:
            if sequence in result.not_finite and sequence.status is SequenceStatus.RUNNING:
                self.finish(sequence, "error")
                finished.append(sequence)
        for sequence in plan.decodes:
            if sequence.status is SequenceStatus.RUNNING:
                self.prefix_cache.publish(sequence, sequence.num_known - 1, sequence.num_known)
                self._append(sequence, sampled[sequence].token_id, finished)
        for chunk in plan.prefills:
            sequence = chunk.sequence
            if sequence.status is SequenceStatus.RUNNING:
                self.prefix_cache.publish(sequence, chunk.start, chunk.start + chunk.length)
                if chunk.is_last:
                    self._append(sequence, sampled[sequence].token_id, finished)
        if finished:
            self._running = [sequence for sequence in self._running if not sequence.finished]
        return finished

    def pages_lost(self) -> None:
        """The KV cache is empty now: running sequences are computed again, and no page is reused.

        Raises `ValueError` while a step is in flight.
        """
        if self._in_flight:
            raise ValueError(f"{len(self._in_flight)} steps in flight read and write pages")
        for sequence in reversed(self.running):
            self._preempt(sequence)
        self.pool.unpublish()

    def resize_pool(self, num_pages: int) -> dict[int, int]:
        """Have another number of pages, while no step is in flight: `PagePool.resize`, and the sequences know it."""
        if self._in_flight:
            raise ValueError(f"{len(self._in_flight)} steps in flight read and write pages; they cannot move")
        moves = self.pool.resize(num_pages)
        for sequence in self._running if moves else ():
            sequence.pages = [moves.get(page, page) for page in sequence.pages]
        return moves

    def _admit(self, prefills: list[PrefillChunk], budget: int, now: float) -> None:
        """Start waiting sequences with what the step has left of tokens, places and pages."""
        if budget == 0 or len(self._running) == self.max_num_seqs:
            return
        pool, chunk = self.pool, self.prefill_chunk
        # Pages are taken chunk by chunk, but promised whole: what running prompts still need, and one page of growth
        # for every running sequence. Without the promise an admission would soon be preempted again.
        promised = len(self._running) + sum(
            max(0, pool.needed(sequence.num_tokens) - len(sequence.pages)) for sequence in self._running
        )
        places = self.max_num_seqs - len(self._running)
        for sequence in self.policy.candidates(self._running, tuple(prefills), now):
            total = sequence.num_tokens
            cached = self.prefix_cache.find(sequence)
            missing = pool.needed(total) - len(cached)
            if self.prefix_cache.is_pending(sequence, cached):
                # Set aside until those pages are there. Its place, and pages of its own, are kept for it.
                promised += 1 + missing
                places -= 1
                if not places:
                    break
                continue
            if not pool.can_allocate(promised + missing + pool.num_idle(cached)):
                self.num_short_steps += 1
                break
            self.policy.remove(sequence)
            self.prefix_cache.take(sequence, cached)
            start = sequence.num_computed
            length = min(total - start, chunk, budget)
            pages = pool.needed(start + length) - len(cached)
            sequence.pages += pool.allocate(pages)
            sequence.status = SequenceStatus.RUNNING
            if sequence.started_at is None:
                sequence.started_at = now
            insort(self._running, sequence, key=_order)
            promised += 1 + missing - pages
            budget -= length
            places -= 1
            prefills.append(PrefillChunk(sequence, start, length, start + length == total))
            if not budget or not places:
                break

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's pages away; it will be prefilled again, its own tokens included."""
        self._running.remove(sequence)
        self.prefix_cache.stopped(sequence)
        self.pool.free(sequence.pages)
        sequence.pages = []
        sequence.num_computed = sequence.num_pending = 0  # a pending token will be sampled again
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        sequence.status = SequenceStatus.WAITING
        self.policy.put_back(sequence)

    def _append(self, sequence: Sequence, token: int, finished: list[Sequence]) -> None:
        sequence.generated.append(token)
        sequence.num_pending -= 1
        if sequence.first_token_at is None:
            sequence.first_token_at = self._now
        params = sequence.params
        if (token in self.eos_token_ids and not params.ignore_eos) or params.stops_at(token):
            sequence.finish_reason = "stop"
        elif len(sequence.generated) >= params.max_tokens or sequence.num_known >= self.max_model_len:
            sequence.finish_reason = "length"
        else:
            return
        self._release(sequence)
        self._book(sequence)
        finished.append(sequence)

    def _is_full(self, sequence: Sequence) -> bool:
        """Whether a sequence is as long as it may get, pending tokens included."""
        return sequence.num_sampled >= sequence.params.max_tokens or sequence.num_tokens >= self.max_model_len

    def _book(self, sequence: Sequence) -> None:
        """Learn from a sequence that came to its own end."""
        self.attainment.record(sequence, self._now)
        self.policy.ended(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Forget a sequence that ended; the caller takes it out of its queue."""
        self.prefix_cache.stopped(sequence)
        self.pool.free(sequence.pages)
        sequence.pages = []
        sequence.status = SequenceStatus.FINISHED
        siblings = self._requests[sequence.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._requests[sequence.request_id]


def _order(sequence: Sequence) -> int:
    return sequence.order
