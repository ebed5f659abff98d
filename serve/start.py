"""From options to a server that answers, and to its end."""

import asyncio
import gc
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
from fastapi import FastAPI
from rich.console import Console

from emoe_jax import EmoeError, Engine
from emoe_jax.device.executables import cache_reads
from emoe_jax.device.runner import FIRST_PIECES
from emoe_jax.errors import ConfigError
from emoe_jax.folders import cache_folder
from emoe_jax.memory.device_settings import pool_share
from emoe_jax.models import family_named
from emoe_jax.planning.slow import slow_parts
from serve.app import create_app
from serve.console import ProgressCallback, loading_progress, start_up_table
from serve.http.hosts import hosts_for
from serve.http.lobby import open_lobby
from serve.http.server import Server, bind, url_of
from serve.http.uds import bind_uds
from serve.interrupt import INTERRUPTED, LEFT_BEHIND, end_at_once_on_signal, leave_at_once
from serve.options import ServerOptions, as_flags
from serve.parsing.forms import AnswerForm, form_of
from serve.recording import check_trace_file
from serve.service import Service
from serve.start_clock import ALL_COMPILED, StartClock
from serve.telemetry.logs import configure_logging
from serve.telemetry.tracing import Tracing, span_provider
from serve.text import TextCodec
from serve.warm_starts import WarmStart
from serve.worker import EngineWorker

log = logging.getLogger("serve")

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider


def run(options: ServerOptions, on_loaded: Callable[[], None], clock: StartClock) -> int:
    """Load and serve until a signal; `on_loaded` is called between the two. Returns the exit status."""
    configure_logging(options.log_format)
    keep_compilations()
    try:
        provider = span_provider(options.otlp_endpoint)
        with bind(options.host, options.port) if options.uds is None else bind_uds(options.uds) as listener:
            hosts = hosts_for(listener, options.allowed_hosts)
            with open_lobby(listener, hosts, read_timeout=options.read_timeout, send_timeout=options.send_timeout):
                loaded = load(options, clock)
            on_loaded()
            serve(options, loaded, listener, provider, clock)
        status = 0
    except EmoeError as error:
        print(f"error: {as_flags(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        status = INTERRUPTED
    end_at_once_on_signal(status)
    return status


def keep_compilations() -> None:
    """Let compiled steps survive restarts, in `compilations_folder`."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(compilations_folder()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def compilations_folder() -> Path:
    """Where `JAX_COMPILATION_CACHE_DIR` says, or in the user's cache folder."""
    if (given := os.environ.get("JAX_COMPILATION_CACHE_DIR")) is not None:
        return Path(given)
    return cache_folder() / "xla"


class Loaded(NamedTuple):
    """An engine that can answer, and what is left of its warm-up: pieces for its owner, between requests."""

    engine: Engine
    chores: Iterator[None] | None = None


def load(options: ServerOptions, clock: StartClock | None = None) -> Loaded:
    """The engine with its shapes compiled; progress goes to stderr. Raises `ConfigError` or `CheckpointError`.

    Where an earlier start of the same engine was warmed up whole, only the first steps are read from the cache now: the
    others follow while there is nothing to answer.
    """
    if options.record_traces is not None:
        check_trace_file(options.record_traces)
    elif options.trace_ranks is not None:
        raise ConfigError("trace_ranks needs record_traces: there is no trace to hold them")
    console = Console(stderr=True)
    console.print(f"loading: {options.model}", markup=False, highlight=False, soft_wrap=True)
    clock = clock or StartClock()
    clock.begin("checkpoint")
    with loading_progress(console) as show:

        def report(stage: str, done: int, total: int) -> None:
            clock.begin(stage)
            show(stage, done, total)

        engine = Engine.load(options.model, options, progress=report)
        report("compile", 0, 1)
        warm = WarmStart(engine)
        chores = warm_up_first(engine, warm, report)
        if chores is None:
            engine.warm_up(progress=report)
            warm.note(engine.parts.runner.workspace_bytes)
            log.info(ALL_COMPILED)
    clock.begin("server")
    return Loaded(engine, chores)


def warm_up_first(engine: Engine, warm: WarmStart, report: ProgressCallback) -> Iterator[None] | None:
    """What is left of the warm-up once the first pieces are done; None where all of it is to be done now: where no
    earlier start was warmed up whole, where one of them had to be compiled, or where slab and KV cache trade memory
    meanwhile, which no request may meet. Raises `CapacityError` where steps take more than is left of the device.
    """
    workspace = warm.workspace_bytes()
    if engine.memory.lean is not None or workspace is None:
        return None
    engine.memory = engine.memory.measured(workspace)
    pieces = _pieces(engine, warm)
    with cache_reads() as reads:
        for done in range(1, FIRST_PIECES + 1):
            next(pieces)
            if not reads.all_found:
                return None
            report("compile", done, FIRST_PIECES)
    return pieces


def _pieces(engine: Engine, warm: WarmStart) -> Iterator[None]:
    pieces = engine.parts.runner.warm_up_in_pieces()
    try:
        while True:
            with cache_reads() as reads:
                is_over = next(pieces, "over") == "over"
            if reads.found < reads.asked:
                log.warning("the cache has lost a step that an earlier start compiled: it was compiled while serving")
                warm.forget()
            if is_over:
                break
            yield
        engine.warm_up()
    except Exception:
        warm.forget()  # the next start meets it before it serves, and says so
        raise
    log.info(ALL_COMPILED)


def serve(
    options: ServerOptions,
    loaded: Loaded,
    listener: socket.socket,
    provider: "TracerProvider | None",
    clock: StartClock,
) -> None:
    """Print what is served, serve until a signal, close the engine."""
    url, engine = url_of(listener), loaded.engine
    step, state = engine.options.step_size(jax.default_backend()), engine.state()
    table = start_up_table(
        model=served_names(options, engine)[0],
        family=engine.config.family,
        routing=_routing(options, state["tolerance"]),
        device=jax.devices()[0].device_kind,
        memory=engine.memory_report(),
        resident=[len(layer) for layer in state["residency"]["experts"]],
        num_experts=engine.config.num_experts,
        expert_format=engine.memory.expert_format,
        dtype=engine.memory.dtype,
        has_tokenizer=engine.tokenizer is not None,
        has_chat_template=engine.tokenizer is not None and engine.tokenizer.has_chat_template,
        tasks=served_tasks(engine),
        step=step,
        sampling=engine.sampling_defaults,
        url=url,
        pool_share=pool_share(os.environ, jax.devices()[0].platform),
        form=answer_form(options, engine),
        shows_tools=engine.tokenizer is not None and engine.tokenizer.shows_tools,
        kernels=engine.parts.kernels,
        predictor=None if engine.parts.predictor is None else str(engine.parts.predictor),
    )
    Console().print(table)
    for line in slow_parts(engine.config, engine.memory, options.contract, jax.default_backend()):
        print(f"slow: {line}")
    worker = make_worker(options, loaded)
    app = make_app(options, engine, worker, hosts_for(listener, options.allowed_hosts), provider)
    gc.collect()
    gc.freeze()  # what is there now stays: no collection looks at it again, at exit neither, which took seconds
    gc.enable()  # `main` has disabled it
    server = Server(
        app,
        worker,
        options.shutdown_timeout,
        on_ready=lambda: print(f"{clock.line()}\nServing on {url}", flush=True),
        read_timeout=options.read_timeout,
        send_timeout=options.send_timeout,
    )
    try:
        asyncio.run(server.serve([listener]))
    finally:
        stopped = worker.stop()
        if stopped:
            engine.close()
        if provider is not None:
            provider.shutdown()  # sends what is left
        if not stopped:
            leave_at_once("a step does not end; the server ends without it", LEFT_BEHIND)


def served_names(options: ServerOptions, engine: Engine) -> tuple[str, ...]:
    """What clients may call the model. The first one is in answers."""
    return tuple(options.served_model_name or [engine.model_name])


def served_tasks(engine: Engine) -> tuple[str, ...] | None:
    """The tasks that requests may name; None if they may name any."""
    return None if engine.task_profile is None else tuple(engine.task_profile.tasks)


def make_worker(options: ServerOptions, loaded: Loaded) -> EngineWorker:
    """The thread of an engine, not started yet."""
    engine, chores = loaded
    step = engine.options.step_size(jax.default_backend())
    return EngineWorker(engine, step.sequences + options.max_num_queued_reqs, options.step_timeout, chores)


def make_app(
    options: ServerOptions,
    engine: Engine,
    worker: EngineWorker,
    hosts: Sequence[str],
    provider: "TracerProvider | None" = None,
) -> FastAPI:
    """The application over an engine, whatever it listens on. Its lifespan starts and stops the worker."""
    names = served_names(options, engine)
    text = TextCodec(
        engine.tokenizer,
        engine.config.vocab_size,
        engine.max_model_len,
        engine.grammars,
        options.chat_template_kwargs,
    )
    form = answer_form(options, engine)
    app = create_app(
        Service(names, text, worker, served_tasks(engine), engine.sampling_defaults, form),
        options.api_key,
        options.allowed_origins,
        None if provider is None else Tracing(provider, names[0]),
        hosts=hosts,
        read_timeout=options.read_timeout,
        root_path=options.root_path,
        keep_alive=options.stream_keep_alive,
        max_stored_responses=options.max_stored_responses,
    )
    app.openapi()  # made now and kept, as it takes long enough to hold up streams
    return app


def answer_form(options: ServerOptions, engine: Engine) -> AnswerForm:
    """How the model writes reasoning and calls of tools: as options, its family or its chat template say."""
    family, tokenizer = family_named(engine.config.family), engine.tokenizer
    writes = (lambda text: False) if tokenizer is None else tokenizer.template_writes
    return form_of(options.reasoning_parser, options.tool_call_parser, (family.reasoning, family.calls), writes)


def _routing(options: ServerOptions, tolerance: float) -> str:
    """The contract of requests that name none, as the start-up table says it."""
    contract, targets = options.contract, options.targets
    if contract != "bounded":
        return contract
    kept = f"tolerance {tolerance:g}"
    if targets is not None:
        of_tasks = "".join(f", {task} {100 * share:g}%" for task, share in targets.of_tasks.items())
        kept = f"quality target {100 * targets.usual:g}%{of_tasks}"
    return f"{contract}, {kept}"
