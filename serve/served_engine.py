"""What the server needs of an engine."""

from collections.abc import Callable
from typing import Any, Protocol

from emoe_jax.engine.vitals import Vitals
from emoe_jax.requests.contract import RoutingContract
from emoe_jax.requests.request import SLO, Delta, RequestOutput, SamplingParams


class ServedEngine(Protocol):
    """What the worker needs of `emoe_jax.Engine`."""

    def add_request(
        self,
        request_id: str,
        prompt: str | list[int],
        params: SamplingParams,
        *,
        task: str | None = None,
        routing: RoutingContract | None = None,
        tolerance: float | None = None,
        slo: SLO | None = None,
        arrival: float | None = None,
        cache_salt: str | None = None,
    ) -> list[int]:
        """Queue a request and return its prompt's token ids. Raises `RequestError`, queueing nothing."""
        ...

    @property
    def vitals(self) -> Vitals:
        """Signs of life of the step that runs. From any thread."""
        ...

    def step(self) -> list[Delta]:
        """Run one batch and return what it added to requests; empty when there is no work."""
        ...

    def has_work(self) -> bool:
        """Whether `step` has something to do or to return."""
        ...

    def on_staged(self, call: Callable[[], None]) -> None:
        """Have `call` called, from another thread, when a step would commit experts though there is no work."""
        ...

    def output(self, request_id: str) -> RequestOutput:
        """The request so far. Raises `KeyError` for an unknown id."""
        ...

    def pop(self, request_id: str) -> RequestOutput:
        """The request's output; aborts and forgets the request."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON-able values for `/v1/emoe/state` and the metrics."""
        ...
