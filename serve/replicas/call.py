"""What gateway, router and replicas exchange under Ray Serve. Ray copies the router into other processes by value, so
it finds these names here.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

ATTAINED, ANSWERS, GOAL = "attained", "answers", "goal"
"""What replicas record for the autoscaling: answers that kept their deadlines, those that had any, the share wanted."""
SERVES = "serves"
"""What replicas publish, and routers go by: by task, how much of its routing the resident experts cover."""
FLEET = "/v1/emoe/replicas"
"""The path that tells what replicas publish. The router adds that to such a call."""
REPLICA = b"x-emoe-replica"
"""The header that names the replica: in an answer, the one that gave it; in a request, the one that should."""
TASK = b"x-emoe-task"


@dataclasses.dataclass(frozen=True)
class Call:
    """An HTTP request on its way to a replica."""

    method: str
    path: str
    raw_path: bytes
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    client: tuple[str, int] | None = None
    task: str | None = None
    replica: str | None = None
    """The one that should answer, if it lives."""
    fleet: Sequence[Mapping[str, Any]] = ()
    """What the router knows of each replica, for a call of `FLEET`."""
