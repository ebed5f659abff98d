"""Which waiting sequence starts next: the interface of admission policies, and first come, first served."""

import itertools
from collections import OrderedDict
from collections.abc import Collection, Iterator
from typing import Any, Protocol

from emoe_jax.requests.sequence import Sequence
from emoe_jax.scheduling.plan import PrefillChunk, StepPlan


class AdmissionPolicy(Protocol):
    """Owns the queue of waiting sequences. The scheduler tells it what happens; all times are seconds of its clock."""

    name: str

    def __len__(self) -> int:
        """How many sequences wait."""
        ...

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """The waiting sequences, by arrival; preempted ones first."""
        ...

    def next_up(self, places: int, now: float) -> list[Sequence]:
        """The sequences that would start next, in order, if so many `places` were free."""
        ...

    def add(self, sequence: Sequence, running: Collection[Sequence]) -> None:
        """A new sequence waits. Raises `RequestError`, queueing nothing, when it refuses the sequence."""
        ...

    def put_back(self, sequence: Sequence) -> None:
        """A preempted sequence waits again, before the others."""
        ...

    def remove(self, sequence: Sequence) -> None:
        """A sequence waits no more: it was started or ended."""
        ...

    def candidates(
        self, running: Collection[Sequence], planned: Collection[PrefillChunk], now: float
    ) -> Iterator[Sequence]:
        """Sequences to start in this step, in order, beside those `running`, of which `planned` compute prompts.

        Asking for the next one means that the last one was started, or that it still waits and is set aside for now.
        """
        ...

    def observe(self, plan: StepPlan, seconds: float, waited: float = 0.0) -> None:
        """A step took `seconds`, and `waited` more for experts to be loaded."""
        ...

    def ended(self, sequence: Sequence) -> None:
        """A sequence came to its own end; it was not aborted."""
        ...

    def state(self) -> dict[str, Any]:
        """What the policy goes by, as JSON-able values."""
        ...


class FcfsPolicy:
    """First come, first served."""

    name = "fcfs"

    def __init__(self) -> None:
        self._queue: OrderedDict[Sequence, None] = OrderedDict()  # any member leaves in O(1)

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """The waiting sequences, preempted ones first."""
        return tuple(self._queue)

    def next_up(self, places: int, now: float) -> list[Sequence]:
        """The first `places` of the queue. The time does not matter."""
        return list(itertools.islice(self._queue, places))

    def add(self, sequence: Sequence, running: Collection[Sequence]) -> None:
        """Queue the sequence last. This policy refuses none."""
        self._queue[sequence] = None

    def put_back(self, sequence: Sequence) -> None:
        """Queue a preempted sequence before all others."""
        self._queue[sequence] = None
        self._queue.move_to_end(sequence, last=False)

    def remove(self, sequence: Sequence) -> None:
        """Take the sequence out of the queue. Raises `KeyError` when it is not there."""
        del self._queue[sequence]

    def candidates(
        self, running: Collection[Sequence], planned: Collection[PrefillChunk], now: float
    ) -> Iterator[Sequence]:
        """The queue from its front. A sequence that still waits when the next one is asked for is passed over."""
        set_aside = 0  # at the front of the queue
        while len(self._queue) > set_aside:
            sequence = next(itertools.islice(self._queue, set_aside, None))
            yield sequence
            set_aside += sequence in self._queue

    def observe(self, plan: StepPlan, seconds: float, waited: float = 0.0) -> None:
        """Nothing: the order of arrival depends on no measurement."""

    def ended(self, sequence: Sequence) -> None:
        """Nothing: the order of arrival depends on no answer."""

    def state(self) -> dict[str, Any]:
        """Empty: the policy has no numbers of its own."""
        return {}
