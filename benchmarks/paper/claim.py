"""A claim of the paper: how it is measured here, and whether the numbers agree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from benchmarks.paper.bench import Bench

How = Literal["live", "replay", "aot", "modelled link"]
"""In a running engine; on a recorded routing trace; by compiling the engine's steps ahead of time for a model's shapes;
in a running engine whose loads take the time of a stated link."""

Agrees = Literal["yes", "no", "partly"]

Numbers = dict[str, Any]
"""What a measurement found, JSON-able."""


@dataclasses.dataclass(frozen=True)
class Conclusion:
    """What the numbers say of the claim."""

    here: str
    agrees: Agrees
    because: str = ""
    """Why they do not agree, or only partly; their own data support it."""

    def __post_init__(self) -> None:
        if self.agrees != "yes" and not self.because:
            raise ValueError(f"{self.here!r} does not agree with the paper, and no reason is given")


@dataclasses.dataclass(frozen=True)
class Claim:
    """One row. `conclude` sees only what `measure` returned, so that a verdict follows from numbers alone."""

    id: str
    claim: str
    paper: str
    how: How
    command: str
    """The instrument that measures it, for one who wants more of it than this row."""
    measure: Callable[[Bench], Numbers]
    conclude: Callable[[Numbers], Conclusion]
    plot: Callable[[Numbers, Any], None] | None = None
    """Draws the numbers on a matplotlib figure; None: the figure of another row shows them, or there is none."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A claim that was measured. `seconds` are those of the measurements it rests on, also where they were kept from
    an earlier run or are shared with other rows."""

    claim: Claim
    numbers: Numbers
    conclusion: Conclusion
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """All but the numbers."""
        return {
            "id": self.claim.id,
            "claim": self.claim.claim,
            "paper": self.claim.paper,
            "here": self.conclusion.here,
            "how": self.claim.how,
            "command": self.claim.command,
            "agrees": self.conclusion.agrees,
            "because": self.conclusion.because,
            "seconds": round(self.seconds, 1),
        }
