"""Which of several replicas of one model gets a request. Pure decisions: no clock, no network, no cluster.

The simulator and the Ray router both decide here.
"""

import random
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple, Protocol

from emoe_jax.errors import ConfigError

THRESHOLD = 2
"""Unfinished requests that a preferred replica may have beyond the least loaded one."""
CLOSE = 0.01
"""Coverages that differ by no more count as equal, so that the load decides between them."""
POINTS = 64
"""Places of a replica on the ring of prefixes."""


class Candidate(NamedTuple):
    """A replica as a router knows it."""

    name: str
    load: int
    """Its unfinished requests."""
    serves: Mapping[str, float] | None = None
    """By task, the share of its routing that the resident experts are expected to cover; None if none was published."""
    alive: bool = True


class Asked(NamedTuple):
    """What is known of a request before it is read."""

    task: str | None = None
    prefix: bytes = b""
    """The beginning of its prompt; empty if it is unknown."""


class NoReplica(LookupError):
    """No replica is alive."""


class ReplicaRouting(Protocol):
    """A way to choose."""

    def choose(self, candidates: Sequence[Candidate], asked: Asked, rng: random.Random) -> Candidate:
        """A candidate that is alive. Raises `NoReplica` if none is."""
        ...


class RandomReplica:
    """Any replica, whatever its load."""

    def choose(self, candidates: Sequence[Candidate], asked: Asked, rng: random.Random) -> Candidate:
        """Each replica that is alive with equal probability."""
        return rng.choice(_within(candidates, None))


class LeastLoaded:
    """A replica with the fewest unfinished requests."""

    def choose(self, candidates: Sequence[Candidate], asked: Asked, rng: random.Random) -> Candidate:
        """One of the least loaded at random."""
        return rng.choice(_within(candidates, 0))


class PrefixAffine:
    """The replica that gets all prompts with this beginning, so that its prefix cache knows them.

    Beginnings and replicas have places on a ring of hashes. A prompt goes to the first replica behind it that has
    at most `threshold` more requests than the least loaded one. A replica that comes or goes moves few beginnings.
    """

    def __init__(self, threshold: int = THRESHOLD):
        """Raises `ConfigError` for a negative threshold."""
        self.threshold = _checked(threshold)
        self._names: tuple[str, ...] = ()
        self._places: list[int] = []
        self._owners: list[str] = []

    def choose(self, candidates: Sequence[Candidate], asked: Asked, rng: random.Random) -> Candidate:
        """The prefix's replica; one of the least loaded if the prefix is unknown."""
        if not asked.prefix:
            return LeastLoaded().choose(candidates, asked, rng)
        allowed = {candidate.name: candidate for candidate in _within(candidates, self.threshold)}
        self._place(tuple(candidate.name for candidate in candidates))
        return next(allowed[name] for name in self._behind(_hash(asked.prefix)) if name in allowed)

    def _place(self, names: tuple[str, ...]) -> None:
        if names != self._names:
            ring = sorted((_hash(f"{point} {name}".encode()), name) for name in names for point in range(POINTS))
            self._names = names
            self._places, self._owners = [place for place, _ in ring], [name for _, name in ring]

    def _behind(self, place: int) -> Iterator[str]:
        """The owners of places, from the first one behind `place` once around."""
        first = bisect(self._places, place)
        yield from self._owners[first:]
        yield from self._owners[:first]


class TaskAffine:
    """A replica whose resident experts serve the task best, of those that are not busier than others by much."""

    def __init__(self, threshold: int = THRESHOLD, close: float = CLOSE):
        """`close`: a difference in coverage that is no reason to prefer. Raises `ConfigError` for a negative one."""
        self.threshold = _checked(threshold)
        if close < 0:
            raise ConfigError(f"close is {close:g}; it must be at least 0")
        self._close = close

    def choose(self, candidates: Sequence[Candidate], asked: Asked, rng: random.Random) -> Candidate:
        """Of the best for the task, one of the least loaded; one of the least loaded of all if none publishes it.

        Only replicas with at most `threshold` more unfinished requests than the least loaded one count.
        """
        allowed = _within(candidates, self.threshold)
        known = [
            (candidate.serves[asked.task], candidate)
            for candidate in allowed
            if asked.task is not None and candidate.serves is not None and asked.task in candidate.serves
        ]
        if not known:
            return LeastLoaded().choose(candidates, asked, rng)
        best = max(share for share, _ in known)
        return rng.choice(_within([candidate for share, candidate in known if share >= best - self._close], 0))


ROUTINGS = ("random", "least-loaded", "prefix-affine", "task-affine")


def make_routing(name: str, threshold: int = THRESHOLD) -> ReplicaRouting:
    """A routing of `ROUTINGS`. Raises `ConfigError` for another name, or a negative threshold."""
    if name == "random":
        return RandomReplica()
    if name == "least-loaded":
        return LeastLoaded()
    if name == "prefix-affine":
        return PrefixAffine(threshold)
    if name == "task-affine":
        return TaskAffine(threshold)
    raise ConfigError(f"there is no routing {name[:40]!r}; expected one of {', '.join(ROUTINGS)}")


def _within(candidates: Sequence[Candidate], threshold: int | None) -> list[Candidate]:
    """Those alive, with at most `threshold` more requests than the least loaded of them; None is no bound."""
    alive = [candidate for candidate in candidates if candidate.alive]
    if not alive:
        raise NoReplica(f"none of {len(candidates)} replicas is alive")
    if threshold is None:
        return alive
    most = min(candidate.load for candidate in alive) + threshold
    return [candidate for candidate in alive if candidate.load <= most]


def _checked(threshold: int) -> int:
    if threshold < 0:
        raise ConfigError(f"the balance threshold is {threshold}; it must be at least 0")
    return threshold


def _hash(content: bytes) -> int:
    """The same in every process, unlike Python's own."""
    return int.from_bytes(blake2b(content, digest_size=8).digest())
