"""Which experts are on the device, kept up between steps: slab, table, store, loader and policy as one thing."""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from emoe_jax.config import ModelConfig
from emoe_jax.experts.link import ModelledLink
from emoe_jax.experts.loader import ExpertLoader
from emoe_jax.experts.loader_stats import LoaderStats
from emoe_jax.experts.record_format import RecordFormat
from emoe_jax.experts.slab import ExpertSlab
from emoe_jax.experts.store import ExpertReader, ExpertStore
from emoe_jax.experts.table import SlotTable
from emoe_jax.experts.tickets import LoadState, LoadTicket
from emoe_jax.policies import POLICIES, PolicyWeights, make_policy
from emoe_jax.policies.pace import Pace
from emoe_jax.policies.policy import ChunkWishes
from emoe_jax.policies.rule import ExpectedWishes
from emoe_jax.residency.ahead import LoadsAhead
from emoe_jax.residency.waves import WaveLoader

log = logging.getLogger(__name__)

FOLLOWING_SHARE = 0.003
"""Of the time: the most that looking at what the policy now prefers may take."""

SWAPS_PER_LAYER = 4
"""Experts that the policy may exchange per layer and look, at most one per token; after a new plan, all it wants."""

SECONDS_BEFORE_RETRY = 30.0
"""How long an expert that could not be read is left alone."""


class StepWishes(NamedTuple):
    """How often a step's routers wished for each expert."""

    counts: Int[np.ndarray, "M E"]
    resident: Int[np.ndarray, "M E"]
    """The wishes whose expert was resident when the batch was dispatched."""
    chunks: Sequence[ChunkWishes]
    """The wishes of prompts' chunks of more than one token, by chunk."""


class Covered(NamedTuple):
    """Wishes of some steps, and how many of them were resident."""

    steps: int
    wishes: int
    resident: int


class Residency:
    """For the owner of the step alone: `commit` before a step, `observe` after it. The rest happens on worker threads.

    A context manager; `close` joins the loader's threads.
    """

    def __init__(
        self,
        config: ModelConfig,
        record_format: RecordFormat,
        capacities: Sequence[int],
        reader: ExpertReader,
        policy: str,
        *,
        rates: Float[np.ndarray, "M E"] | None = None,
        knowledge: PolicyWeights | None = None,
        link_bandwidth: float | None = None,
        modelled_link: ModelledLink | None = None,
        host_bytes: int = 0,
        memory_kind: str | None = None,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`rates` say what is resident before anything was observed; `link_bandwidth` is in bytes/s (None: no limit)
        and holds background loads back. All loads go over `modelled_link`, where there is one. The policy
        `random` draws by `seed`. `clock` (seconds) says when the policy is looked at, and when an expert that could
        not be read is tried again.

        Raises `ConfigError` for an unknown policy or a bandwidth that is not positive.
        """
        self.policy_name = policy
        shape = (len(config.moe_layers), config.num_experts)
        self.policy = make_policy(policy, *shape, rates, knowledge, seed)
        self.slab = ExpertSlab(record_format, capacities)
        self.table = SlotTable(capacities, config.num_experts, sharding=self.slab.sharding)
        self.config = config
        self._store = ExpertStore(
            reader,
            record_format,
            len(config.moe_layers),
            config.num_experts,
            host_bytes,
            memory_kind=memory_kind,
            sharding=self.slab.sharding,
        )
        self._loader = ExpertLoader(
            self._store,
            self.slab,
            self.table,
            bandwidth=link_bandwidth,
            link=modelled_link,
            workers=1 if memory_kind is None else 2,  # a CPU's cores compute
        )
        ahead = LoadsAhead(self._loader, self.table) if POLICIES[policy].looks_ahead else None
        self.waves = WaveLoader(self._loader, self.table, self._eviction_order, ahead)
        self._wishes: Int[np.ndarray, "M E"] = np.zeros(shape, np.int64)
        self._wishes_resident = 0
        self._covered = Covered(0, 0, 0)  # since the last look at what the policy prefers
        self._clock = clock
        self._following = Pace(FOLLOWING_SHARE, clock)
        self._link_bandwidth = link_bandwidth
        self._tickets: list[LoadTicket] = []  # asked for by the policy and not over
        self._unproven: Bool[np.ndarray, "M E"] = np.zeros(shape, bool)  # loaded, and not wished for since
        self._doubtful = np.zeros_like(
            self._unproven
        )  # evicted unproven; a step in flight may still have wished for it
        self._unreadable_until = np.full(shape, -np.inf)  # seconds on the clock
        self._useful = self._useless = 0
        self._settled_seconds = 0.0
        self._last_error: str | None = None

    def fill(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Load the policy's initial experts, and have the others come to host memory in the background, those of the
        highest scores first. Raises what the store raises when one of the initial ones cannot be read."""
        self._loader.fill(self.policy.initial(self.table.capacities), progress)
        order = np.argsort(-self.policy.scores(), axis=None, kind="stable")
        layers, experts = np.unravel_index(order, self.table.resident_mask.shape)
        self._store.start_filling(zip(layers.tolist(), experts.tolist(), strict=True))

    @property
    def is_full(self) -> bool:
        """Whether every expert of every layer has a slot, so that all contracts are the same."""
        return all(capacity == self.config.num_experts for capacity in self.table.capacities)

    @property
    def loads(self) -> LoaderStats:
        """Totals of the loader since it was made."""
        return self._loader.stats

    @property
    def expert_bytes(self) -> int:
        """Of one expert in the slab."""
        return self.slab.record_format.nbytes

    @property
    def coverage(self) -> float | None:
        """Share of the routers' wishes that were resident when they arose, since the start; None before the first."""
        wishes = int(self._wishes.sum())
        return self._wishes_resident / wishes if wishes else None

    def on_staged(self, call: Callable[[], None]) -> None:
        """Have `call` called, from another thread, when loads are staged and wait for a `commit`."""
        self._loader.on_settled(call)
        if self._loader.has_ready:
            call()

    @property
    def waited_seconds(self) -> float:
        """How long the owner of the step has waited for loads so far, in `settle` and in waves."""
        return self._settled_seconds + self._loader.wait_seconds

    def commit(self) -> None:
        """Bring staged experts into the slab. Never waits, but for experts that a failed commit or step has lost.

        A commit that fails on the device costs its own loads, which are left alone for a while as if they could not be
        read. Raises what the store raises when the experts of a lost layer cannot be loaded again.
        """
        if self._loader.must_restore:
            self._loader.restore()
        if not self._loader.has_ready:
            return
        committed, resident = [], self.table.resident_mask
        try:
            committed = self._loader.commit()
        except Exception as error:
            log.exception("a commit failed; its experts are left alone for %g s", SECONDS_BEFORE_RETRY)
            self._last_error = f"commit: {type(error).__name__}: {error}"[:500]
            self._loader.restore()
            self._doubt_evicted()
        for ticket in committed:
            self._unproven[ticket.layer, ticket.expert] = True
        if self.table.resident_mask is not resident:
            self._doubt_evicted()

    def mend(self) -> None:
        """After a step has failed: layers whose weights are gone get others, and their experts before the next step."""
        self._loader.mend()

    def plan(self, expected: ExpectedWishes) -> None:
        """Tell the policy what the running requests are expected to wish for, and ask for whatever it now prefers.
        Loads that have become pointless are given up."""
        self.policy.plan(expected)
        self._follow_policy(self.config.num_experts)

    def settle(self, seconds: float) -> None:
        """Commit what has been asked for as it arrives, until all of it is there or the time is over."""
        began = time.monotonic()
        deadline = began + seconds
        self._sort_out_tickets()
        while self._tickets and (left := deadline - time.monotonic()) > 0:
            self._loader.wait_idle(left)
            self.commit()
            self._sort_out_tickets()
        self._settled_seconds += time.monotonic() - began

    def observe(
        self,
        wish_counts: Int[np.ndarray, "M E"],
        resident_counts: Int[np.ndarray, "M E"] | None = None,
        chunks: Sequence[ChunkWishes] = (),
    ) -> Covered | None:
        """Note the wishes of a step and, as often as time allows, ask for the experts that the policy now prefers.

        `resident_counts` are those of the wishes whose expert was resident when the step was dispatched, before it
        loaded any itself. Without them, nothing may have been committed since. Of the wishes, those of
        `chunks` are of prompts.
        Returns what the residents covered since it last did, or None.
        """
        if resident_counts is None:
            resident_counts = wish_counts * self.table.resident_mask
        self.policy.observe(wish_counts - sum(chunk.counts for chunk in chunks), chunks)
        self._count(wish_counts, resident_counts)
        if not self._following.due:
            return None
        with self._following.timed():
            covered, self._covered = self._covered, Covered(0, 0, 0)
            tokens = covered.wishes // (self.config.top_k * len(wish_counts))
            self._follow_policy(min(SWAPS_PER_LAYER, max(1, tokens)))
        return covered

    def load(self, needed: Bool[np.ndarray, "M E"]) -> None:
        """Have these experts resident before returning; of the others, those of the lowest scores make room.

        Raises `CapacityError` where a layer has fewer slots, and what the store raises.
        """
        layers = np.flatnonzero((needed & ~self.table.resident_mask).any(axis=1))
        orders = np.argsort(self.policy.scores()[layers], axis=1, kind="stable")
        self._loader.load_layers(
            (int(layer), np.flatnonzero(needed[layer]), order) for layer, order in zip(layers, orders, strict=True)
        )

    def resize(self, layer: int, capacity: int) -> None:
        """Give a layer another number of slots; of its experts those of the highest scores stay.

        Only while no step is in flight. Loads under way go on, and find a place or not when they are committed.
        """
        self._loader.drop_half_written(layer)
        order = self._eviction_order(layer)[::-1]
        experts = [int(expert) for expert in order if self.table.is_resident(layer, expert)][:capacity]
        self.slab.resize(layer, capacity, [self.table.slot(layer, expert) for expert in experts])
        self.table.resize(layer, capacity, experts)
        self._store.use_residents(self.table.resident_mask)
        self._doubt_evicted()

    def refill(self) -> None:
        """Ask for the best of the absent experts where slots are empty."""
        self._sort_out_tickets()
        absent = ~(self.table.resident_mask | self._loader.in_flight())
        scores = np.where(absent, self.policy.scores(), -np.inf)
        for layer, order in enumerate(np.argsort(-scores, axis=1, kind="stable")):
            count = min(len(self.table.empty_slots(layer)), int(absent[layer].sum()))
            for expert in order[:count].tolist():
                self._tickets.append(self._loader.request(layer, expert, float(scores[layer, expert])))

    def _count(self, wish_counts: Int[np.ndarray, "M E"], resident_counts: Int[np.ndarray, "M E"]) -> None:
        wishes, resident = int(wish_counts.sum()), int(resident_counts.sum())
        self._wishes += wish_counts
        self._wishes_resident += resident
        steps, wishes_before, resident_before = self._covered
        self._covered = Covered(steps + 1, wishes_before + wishes, resident_before + resident)
        if self._unproven.any() or self._doubtful.any():
            proven = (self._unproven | self._doubtful) & (resident_counts > 0)
            self._useful += int(proven.sum())
            self._useless += int((self._doubtful & ~proven).sum())
            self._unproven &= ~proven
            self._doubtful[:] = False

    def _doubt_evicted(self) -> None:
        """Take note of loads that were evicted before a router wished for them.

        The next step to be counted may have been dispatched before, and then it has the last word: at most one step is
        in flight when residents change.
        """
        resident = self.table.resident_mask
        self._doubtful |= self._unproven & ~resident
        self._unproven &= resident

    def _follow_policy(self, limit_per_layer: int) -> None:
        self._sort_out_tickets()
        busy = self._loader.in_flight()
        if self._last_error is not None:
            busy |= self._unreadable_until > self._clock()
        for swap in self.policy.swaps(self.table.resident_mask, limit_per_layer, busy):
            self._tickets.append(self._loader.request(swap.layer, swap.load, swap.gain, evict=swap.evict))

    def _sort_out_tickets(self) -> None:
        """Forget loads that are over, give up those that the policy no longer wants, note those that failed."""
        if not self._tickets:
            return
        scores, active = self.policy.scores(), []
        for ticket in self._tickets:
            if ticket.state is LoadState.FAILED:
                self._unreadable_until[ticket.layer, ticket.expert] = self._clock() + SECONDS_BEFORE_RETRY
                self._last_error = f"expert {ticket.expert} of MoE layer {ticket.layer}: {ticket.error}"
            elif ticket.is_active:
                layer = scores[ticket.layer]
                is_wanted = ticket.evict is None or layer[ticket.expert] >= layer[ticket.evict]
                if is_wanted or not self._loader.cancel(ticket):
                    active.append(ticket)
        self._tickets = active

    def state(self) -> dict[str, Any]:
        """Residency and loads as JSON-able values: per MoE layer, resident experts and how often routers wished for
        each expert since the start; `loading` has pairs of MoE layer and expert.
        """
        capacities, stats = self.table.capacities, self._loader.stats
        ahead = self.waves.ahead
        loading = [[ticket.layer, ticket.expert] for ticket in self._tickets if ticket.is_active]
        return {
            "policy": self.policy_name,
            "num_experts": self.config.num_experts,
            "top_k": self.config.top_k,
            "moe_layers": list(self.config.moe_layers),
            "slots": list(capacities),
            "share": sum(capacities) / (len(capacities) * self.config.num_experts),
            "experts": [self.table.resident(layer).tolist() for layer in range(len(capacities))],
            "loading": loading,
            "wishes": self._wishes.tolist(),
            "coverage": self.coverage,
            "loads": dataclasses.asdict(stats)
            | {
                "bandwidth": stats.bandwidth,
                "link_bandwidth": self._link_bandwidth,
                "in_flight": len(loading),
                "useful": self._useful,
                "useless": self._useless,
                "layers_spared": self.policy.layers_spared,
                "last_error": self._last_error,
            },
            "ahead": None if ahead is None else dataclasses.asdict(ahead.stats),
            "store": dataclasses.asdict(self._store.stats),
        }

    def close(self) -> None:
        """Cancel what is being loaded and join the threads of loader and store. No step may follow."""
        self._loader.close()
        self._store.close()

    def __enter__(self) -> "Residency":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _eviction_order(self, layer: int) -> Int[np.ndarray, " E"]:
        return np.argsort(self.policy.scores()[layer], kind="stable")
