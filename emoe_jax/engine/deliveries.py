"""Several callers drive the steps of one engine: every delta and every failure reaches the caller that asked for it."""

from collections import deque
from collections.abc import Iterable

from emoe_jax.requests.request import Delta


class Deliveries:
    """Deltas and failures between the step that made them and the caller that takes them.

    A request that was opened here belongs to an iterator or to a `generate` call. All others belong to the caller of
    `Engine.step`. A delta is handed out once. What waits here is at most the rest of the answers.
    """

    def __init__(self) -> None:
        self._opened: dict[str, deque[Delta]] = {}
        self._failures: dict[str, Exception] = {}
        self._others: deque[Delta] = deque()

    def open(self, request_id: str, *, keep: bool = True) -> None:
        """Keep the deltas of a request for `take`. With `keep=False` they are dropped, because no `take` follows."""
        self._opened[request_id] = deque(maxlen=None if keep else 0)

    def close(self, request_id: str) -> None:
        """Forget a request and what waits for it."""
        self._opened.pop(request_id, None)
        self._failures.pop(request_id, None)
        if self._others:
            self._others = deque(delta for delta in self._others if delta.request_id != request_id)

    def put(self, deltas: Iterable[Delta]) -> None:
        """Hand in what a step has made."""
        for delta in deltas:
            self._opened.get(delta.request_id, self._others).append(delta)

    def fail(self, request_id: str, error: Exception) -> None:
        """A step that this request was part of has failed."""
        self._failures[request_id] = error

    def is_assigned(self, error: Exception) -> bool:
        """Whether a caller will be told of this failure."""
        return any(failure is error for failure in self._failures.values())

    def take(self, request_id: str) -> Iterable[Delta]:
        """The oldest deltas of an opened request first. Raises its failure after the last of them."""
        waiting = self._opened[request_id]
        while waiting:
            yield waiting.popleft()
        self.check(request_id)

    def check(self, request_id: str) -> None:
        """Raise the failure of an opened request, if it has one."""
        if (failure := self._failures.get(request_id)) is not None:
            raise failure

    @property
    def has_others(self) -> bool:
        """Whether something waits for the caller of `Engine.step`."""
        return bool(self._others) or not self._failures.keys() <= self._opened.keys()

    def take_others(self) -> list[Delta]:
        """What waits for the caller of `Engine.step`. Raises a failure of its requests; the deltas come next time."""
        failed = [request_id for request_id in self._failures if request_id not in self._opened]
        if failed:
            error = self._failures[failed[0]]
            for request_id in failed:
                if self._failures[request_id] is error:
                    del self._failures[request_id]
            raise error
        deltas = list(self._others)
        self._others.clear()
        return deltas
