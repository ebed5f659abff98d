"""How Ray Serve chooses a replica and their number. It loads no JAX: routers run where no engine is."""

import dataclasses
import random
from typing import Any

from ray.serve.config import AutoscalingContext  # pyright: ignore[reportMissingImports]
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica  # pyright: ignore[reportMissingImports]

from emoe_jax.scheduling.replicas import THRESHOLD, Asked, Candidate, make_routing
from emoe_jax.scheduling.scaling import wanted_replicas
from serve.replicas.call import ANSWERS, ATTAINED, FLEET, GOAL, SERVES, Call


class ReplicaRouter(RequestRouter):
    """Ray's side of `make_routing`: loads are Ray's counts, and `serves` is what replicas published last."""

    def initialize_state(self, routing: str = "task-affine", threshold: int = THRESHOLD, **_: Any) -> None:
        """Ray calls it with `request_router_kwargs`."""
        self._routing = make_routing(routing, threshold)
        self._rng = random.Random()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The chosen replica, and the others for the case that it takes no more."""
        call = pending_request.args[0] if pending_request is not None and pending_request.args else None
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if not replicas:
            return []
        if pending_request is not None and isinstance(call, Call) and call.path.rstrip("/").endswith(FLEET):
            known = [self._known(name, replica) for name, replica in sorted(replicas.items())]
            pending_request.args = [dataclasses.replace(call, fleet=known), *pending_request.args[1:]]
        if isinstance(call, Call) and call.replica is not None:
            return [[replicas[call.replica]]] if call.replica in replicas else [candidate_replicas]
        candidates = [
            Candidate(name, self._load(replica), (replica.routing_stats or {}).get(SERVES))
            for name, replica in replicas.items()
        ]
        asked = Asked(call.task, call.body[:256]) if isinstance(call, Call) else Asked()
        name = self._routing.choose(candidates, asked, self._rng).name
        others = [replica for other, replica in replicas.items() if other != name]
        return [[replicas[name]], others] if others else [[replicas[name]]]

    def _load(self, replica: RunningReplica) -> int:
        """Its unfinished requests."""
        return self.replica_queue_len_cache.get(replica.replica_id) or 0

    def _known(self, name: str, replica: RunningReplica) -> dict[str, Any]:
        """The load of a replica, and what it published last."""
        return {"name": name, "unfinished": self._load(replica), **(replica.routing_stats or {})}


def queue_and_deadlines(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """The autoscaling policy: by unfinished requests, and by the deadlines that replicas recorded as kept."""
    recorded = context.aggregated_metrics or {}
    kept, answers, goals = (list(recorded.get(name, {}).values()) for name in (ATTAINED, ANSWERS, GOAL))
    attainment = sum(kept) / sum(answers) if sum(answers) > 0 else None
    target = context.config.get_target_ongoing_requests() if context.config is not None else 1.0
    wanted = wanted_replicas(
        context.current_num_replicas,
        context.total_num_requests,
        target,
        attainment,
        max(goals, default=0.0),
    )
    return wanted, {}
