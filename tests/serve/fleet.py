"""Replicas behind one address, without Ray: each request goes to a replica as the gateway passes it on."""

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from serve.app import create_app
from serve.replicas.call import FLEET, REPLICA, Call
from serve.replicas.replica import LocalServer
from serve.service import Service
from serve.text import TextCodec
from serve.worker import EngineWorker
from tests.serve.fake import MAX_MODEL_LEN, VOCAB_SIZE, FakeEngine


def local_server(engine: FakeEngine, name: str = "replica 7", worker: EngineWorker | None = None) -> LocalServer:
    worker = worker or EngineWorker(engine, 100)
    service = Service(("fake",), TextCodec(engine.tokenizer, VOCAB_SIZE, MAX_MODEL_LEN), worker, ("qa", "sum"))
    return LocalServer(create_app(service), worker, name)


class Fleet:
    """An ASGI application over replicas by name. The one that a request names answers it, else the last one."""

    def __init__(self, engines: Mapping[str, FakeEngine]):
        self._workers = {name: EngineWorker(engine, 100) for name, engine in engines.items()}
        self.servers = {name: local_server(engine, name, self._workers[name]) for name, engine in engines.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            for step in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{step}.complete"})
            for worker in self._workers.values():
                worker.stop()
            return
        request = Request(scope, receive)
        known = [self._known(name, await server.published()) for name, server in self.servers.items()]
        headers = [(bytes(name), bytes(value)) for name, value in scope["headers"]]
        call = Call(
            request.method,
            scope["path"],
            scope["raw_path"],
            scope["query_string"],
            headers,
            await request.body(),
            fleet=known if scope["path"] == FLEET else (),
        )
        wanted = dict(headers).get(REPLICA, b"").decode()
        server = self.servers.get(wanted) or list(self.servers.values())[-1]
        async for message in server.answer(call):
            await send(message)

    def _known(self, name: str, published: dict[str, Any]) -> dict[str, Any]:
        return {"name": name, "unfinished": 1, **published}
