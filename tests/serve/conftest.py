"""A real uvicorn server on a free port over a fake engine, in a thread of the test process."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from serve.app import create_app
from serve.http.protocol import HttpConfig
from serve.http.server import bind, url_of
from serve.lanes import MAX_WAITING_BYTES
from serve.parsing.forms import PLAIN, AnswerForm
from serve.service import Service
from serve.telemetry.tracing import Tracing
from serve.text import ServedGrammars, TextCodec
from serve.worker import EngineWorker
from tests.serve.checkpoint import write_tiny_checkpoint
from tests.serve.fake import MAX_MODEL_LEN, VOCAB_SIZE, FakeEngine, FakeTokenizer

StartServer = Callable[..., AbstractContextManager[httpx.Client]]


@contextlib.contextmanager
def running_server(
    engine: FakeEngine,
    *,
    max_unfinished: int = 1000,
    max_waiting_bytes: int = MAX_WAITING_BYTES,
    api_keys: Sequence[str] = (),
    allowed_origins: Sequence[str] = (),
    tasks: tuple[str, ...] | None = None,
    tracing: Tracing | None = None,
    hosts: Sequence[str] = ("*",),
    read_timeout: float = 30.0,
    send_timeout: float = 60.0,
    grammars: ServedGrammars | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    sampling_defaults: Mapping[str, Any] | None = None,
    root_path: str = "",
    keep_alive: float = 15.0,
    form: AnswerForm = PLAIN,
    max_model_len: int = MAX_MODEL_LEN,
    patience: float = 30.0,
) -> Iterator[httpx.Client]:
    worker = EngineWorker(engine, max_unfinished, patience)
    text = TextCodec(
        engine.tokenizer,
        VOCAB_SIZE,
        max_model_len,
        grammars,
        template_kwargs=template_kwargs,
        max_waiting_bytes=max_waiting_bytes,
    )
    service = Service(("fake", "alias"), text, worker, tasks, sampling_defaults or {}, form)
    app = create_app(
        service,
        api_keys,
        allowed_origins,
        tracing,
        hosts=hosts,
        read_timeout=read_timeout,
        root_path=root_path,
        keep_alive=keep_alive,
    )
    with serving(app, read_timeout=read_timeout, send_timeout=send_timeout) as client:
        yield client


@contextlib.contextmanager
def serving(app: Any, *, read_timeout: float = 30.0, send_timeout: float = 60.0) -> Iterator[httpx.Client]:
    """A client of an ASGI application that uvicorn runs."""
    config = HttpConfig(app, read_timeout=read_timeout, send_timeout=send_timeout, log_level="critical")
    server = uvicorn.Server(config)
    listener = bind("127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        with httpx.Client(base_url=url_of(listener), timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="session")
def client() -> Iterator[httpx.Client]:
    """For tests that leave the engine as it was."""
    with running_server(FakeEngine(FakeTokenizer())) as client:
        yield client


@pytest.fixture
def start_server() -> StartServer:
    return running_server


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints") / "tiny"
    write_tiny_checkpoint(directory)
    return directory
