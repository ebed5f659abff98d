"""python -m serve.ray_app: several replicas of the server on a Ray cluster, behind one address.

    client --HTTP--> Ray's proxy --> Gateway --Call--> ReplicaRouter --> Replica: the application of `serve.app`

The gateway tries a request again on another replica as long as the client has seen nothing of the answer.
"""

import dataclasses
import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Sequence
from typing import Any

try:
    import ray  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(f"error: {error}: pip install 'emoe-jax[ray]'", file=sys.stderr)
    sys.exit(2)
from ray import serve as ray_serve  # pyright: ignore[reportMissingImports]
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, HTTPOptions, RequestRouterConfig  # pyright: ignore[reportMissingImports]
from ray.serve.handle import DeploymentHandle  # pyright: ignore[reportMissingImports]
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from emoe_jax.errors import ConfigError, EmoeError
from emoe_jax.option_fields import option
from emoe_jax.scheduling.replicas import THRESHOLD, make_routing
from serve.flags import flag_names, parser_of, read_values
from serve.interrupt import INTERRUPTED
from serve.options import TITLES, ServerOptions
from serve.replicas.gateway import Forwarder

NAME = "emoe"
"""Of the application in Ray Serve."""
ROUTER = "serve.replicas.router.ReplicaRouter"
SCALING = "serve.replicas.router:queue_and_deadlines"
RAY_SETTINGS = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60", "RAY_worker_niceness": "0"}
"""What Ray does otherwise: its proxy has 5 s to start, which is little beside engines that compile, and workers run at
the lowest priority, behind all else on the machine."""
HEALTH_SECONDS = 2.0
"""Between two health checks."""
STUCK_SECONDS = 60.0
"""After which a health check that is not answered counts as failed."""
MAX_REQUESTS = 1000
"""Of a replica at once. Its server refuses more than --max-num-queued-reqs that wait, with 503."""
PUBLISH_SECONDS = 0.5
"""Between two publications of what a replica serves."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplicaOptions(ServerOptions):
    """What `python -m serve.ray_app` is told: all options of the server, and those of its replicas."""

    replicas: int = option(2, "replicas at the start, and at least", low=1, metavar="N")
    max_replicas: int = option(
        0, "replicas at most; more than --replicas are added and removed as needed", low=0, metavar="N",
        default_text="as many as --replicas",
    )  # fmt: skip
    target_requests: float = option(
        8.0, "unfinished requests of a replica that the number of replicas aims at", low=0, open_low=True, metavar="N"
    )
    slo_goal: float = option(
        0.95, "share of deadlines to be kept; below it a replica is added", low=0, high=1, metavar="SHARE"
    )
    replica_routing: str = option(
        "task-affine", "how a replica is chosen: random, least-loaded, prefix-affine or task-affine", metavar="NAME"
    )
    balance_threshold: int = option(
        THRESHOLD, "requests that a preferred replica may have beyond the least loaded one", low=0, metavar="N"
    )
    replica_cpus: float = option(1.0, "processor cores that Ray reserves for a replica", low=0, metavar="N")
    replica_gpus: float = option(0.0, "GPUs that a replica gets", low=0, metavar="N")

    @property
    def most(self) -> int:
        """Replicas at most."""
        return max(self.replicas, self.max_replicas)


class Replica:
    """One engine and its application, answering calls of the gateway."""

    def __init__(self, values: dict[str, Any]):
        """Loads the model; `values` are those of `ReplicaOptions`."""
        from serve.replicas.replica import LocalServer  # with JAX, which the gateway does without

        self._options = ReplicaOptions(**values)
        name = ray_serve.get_replica_context().replica_id.unique_id
        self._server = LocalServer.load(self._options, name)

    async def answer(self, call: Any) -> AsyncGenerator[Message, None]:
        """ASGI messages: the status with its headers, then the body in pieces."""
        async for message in self._server.answer(call):
            yield message

    async def record_routing_stats(self) -> dict[str, Any]:
        """What routers learn of this replica every `PUBLISH_SECONDS`."""
        return await self._server.published()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What the autoscaling learns."""
        return await self._server.deadlines(self._options.slo_goal)

    async def check_health(self) -> None:
        """Raises `RuntimeError` once the engine does not work any more: Ray then starts another replica."""
        self._server.check_health()


class Gateway:
    """Reads a request, has a replica answer it, and sends it to another one if that dies before the answer began."""

    def __init__(self, replicas: DeploymentHandle, read_timeout: float):
        self._forwarder = Forwarder(replicas, read_timeout)

    async def __call__(self, request: Request) -> Response:
        """Answer one request."""
        return await self._forwarder.answer(request)


def build(options: ReplicaOptions) -> ray_serve.Application:
    """The application, for `ray.serve.run`."""
    values = dataclasses.asdict(options)
    router: dict[str, Any] = {  # Ray's annotation of these keywords is wrong
        "request_router_class": ROUTER,
        "request_router_kwargs": {"routing": options.replica_routing, "threshold": options.balance_threshold},
        "request_routing_stats_period_s": PUBLISH_SECONDS,
    }
    chosen: dict[str, Any] = {
        "health_check_period_s": HEALTH_SECONDS,
        "health_check_timeout_s": STUCK_SECONDS,
        "max_ongoing_requests": MAX_REQUESTS,
        "ray_actor_options": {"num_cpus": options.replica_cpus, "num_gpus": options.replica_gpus},
        "graceful_shutdown_timeout_s": options.shutdown_timeout,
        "request_router_config": RequestRouterConfig(**router),
    }
    if options.most > options.replicas:
        chosen["autoscaling_config"] = AutoscalingConfig(
            min_replicas=options.replicas,
            initial_replicas=options.replicas,
            max_replicas=options.most,
            target_ongoing_requests=options.target_requests,
            policy=AutoscalingPolicy(policy_function=SCALING),
        )
    else:
        chosen["num_replicas"] = options.replicas
    gateway: dict[str, Any] = {
        "health_check_period_s": HEALTH_SECONDS,
        "max_ongoing_requests": options.most * MAX_REQUESTS,
        "ray_actor_options": {"num_cpus": 0},
    }
    replicas = ray_serve.deployment(**chosen)(Replica).bind(values)
    return ray_serve.deployment(**gateway)(Gateway).bind(replicas, options.read_timeout)


def parse(arguments: Sequence[str]) -> ReplicaOptions:
    """Flags, and the file given with `--config`. Exits with status 2 and one line on any mistake."""
    description = "Serve several replicas of a Mixture-of-Experts model on a Ray cluster, behind one address."
    parser = parser_of(ReplicaOptions, "python -m serve.ray_app", description, {**TITLES, ReplicaOptions: "replicas"})
    try:
        options = ReplicaOptions(**read_values(parser, ReplicaOptions, arguments))
        if options.uds is not None:
            raise ConfigError("--uds is for one server; Ray Serve listens on --host and --port")
        if 0 < options.max_replicas < options.replicas:
            raise ConfigError(
                f"max_replicas is {options.max_replicas}; expected at least the {options.replicas} replicas"
            )
        make_routing(options.replica_routing, options.balance_threshold)  # raises for an unknown one
    except ConfigError as error:
        parser.error(flag_names(str(error), ReplicaOptions))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal. Joins the cluster that `RAY_ADDRESS` names, else starts one on this machine."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    port = options.port or _free_port(options.host)
    status = INTERRUPTED
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        application = build(options)
        for name, value in RAY_SETTINGS.items():
            os.environ.setdefault(name, value)  # read by Ray's processes
        ray.init(include_dashboard=False)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # again: Ray's handler would end in an abort
        ray_serve.start(http_options=HTTPOptions(host=options.host, port=port))
        ray_serve.run(application, name=NAME, route_prefix=options.root_path or "/")
        status = 0
        print(f"Serving on http://{options.host}:{port}", flush=True)
        signal.pause()
    except EmoeError as error:
        print(f"error: {flag_names(str(error), ReplicaOptions)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return status
    finally:
        if ray.is_initialized():
            ray_serve.shutdown()
            ray.shutdown()
    return 0


def _free_port(host: str) -> int:
    with socket.socket() as listener:
        listener.bind((host, 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    # Ray names classes by their module: as `__main__` they would be of another module in each process.
    from serve import ray_app

    sys.exit(ray_app.main())
