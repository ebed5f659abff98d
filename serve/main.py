"""python -m serve.main: load a model and serve it."""

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console

from emoe_jax import EmoeError, Engine
from serve.app import create_app
from serve.console import loading_bar, start_up_table
from serve.options import Options, parse_options
from serve.server import Server, bind, url_of
from serve.service import Service
from serve.text import TextCodec
from serve.worker import EngineWorker


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    keep_compilations()
    try:
        with bind(options.host, options.port) as listener:
            engine = load(options)
            serve(options, engine, listener)
    except EmoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def keep_compilations() -> None:
    """Let compiled steps survive restarts, where `JAX_COMPILATION_CACHE_DIR` says or in the user's cache folder."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emoe-jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def load(options: Options) -> Engine:
    with loading_bar(Console(stderr=True)) as report:
        engine = Engine.load(
            options.model,
            expert_memory=options.expert_memory,
            routing=options.routing,
            dtype=options.dtype,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            policy=options.policy,
            host_memory=options.host_memory,
            task_profile=None if options.task_profile == "none" else options.task_profile,
            record_traces=options.record_traces,
            seed=options.seed,
            progress=report,
        )
        engine.warm_up(progress=report)
    return engine


def serve(options: Options, engine: Engine, listener: socket.socket) -> None:
    """Print what is served, serve until a signal, close the engine."""
    console = Console()
    url = url_of(listener)
    names = tuple(options.served_model_name or [engine.model_name])
    console.print(
        start_up_table(
            model=names[0],
            family=engine.config.family,
            routing=options.routing,
            memory=engine.memory_report(),
            resident=[len(layer) for layer in engine.state()["residency"]["experts"]],
            num_experts=engine.config.num_experts,
            url=url,
        )
    )
    worker = EngineWorker(engine, options.max_num_seqs + options.max_num_queued_reqs)
    text = TextCodec(engine.tokenizer, engine.config.vocab_size, engine.max_model_len)
    app = create_app(Service(names, text, worker), options.api_key)
    server = Server(app, worker, options.shutdown_timeout, on_ready=lambda: print(f"Serving on {url}", flush=True))
    try:
        asyncio.run(server.serve([listener]))
    finally:
        if worker.stop():
            engine.close()


if __name__ == "__main__":
    sys.exit(main())
