"""`ServerOptions`: every option of the server, once. Those of the engine are in `EngineConfig`."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal

from emoe_jax.demo import MISSING, demo_model, is_missing
from emoe_jax.engine_config import EngineConfig
from emoe_jax.errors import ConfigError
from emoe_jax.option_fields import option
from emoe_jax.requests.request import RESERVED_VARIABLES
from serve.flags import Parser, flag_names, parser_of, read_values
from serve.http.paths import hides_own_path
from serve.parsing.forms import CallForm, ReasoningForm
from serve.telemetry.logs import LogFormat
from serve.watchdog import PATIENCE_SECONDS

COMMAND = "python -m serve.main"
DEMO_MODEL = demo_model()
KEEP_ALIVE_SECONDS = 15.0
"""Proxies cut what is silent for longer: nginx after 60 s, many load balancers after 30 s."""

MAX_STORED_RESPONSES = 1000

LONGEST_SECONDS = 86400


def _template_kwargs(value: dict[str, Any], name: str) -> dict[str, Any]:
    for reserved in RESERVED_VARIABLES:
        if reserved in value:
            raise ConfigError(f"cannot set {reserved}")
    return value


def _origin(text: str, name: str) -> str:
    if text != "*" and not re.fullmatch(r"https?://[^/\s]+", text):
        raise ConfigError(f"{text[:40]!r} is neither * nor of the form https://example.org")
    return text


def _host(text: str, name: str) -> str:
    if text != "*" and not re.fullmatch(r"[\w.-]+|\[[0-9a-fA-F:.]+\]", text):
        raise ConfigError(f"{text[:40]!r} is neither * nor a name or address without port")
    return text.lower()


def _root_path(text: str, name: str) -> str:
    path = text.rstrip("/")
    if path and not re.fullmatch(r"(/[\w.~-]+)+", path, re.ASCII):
        raise ConfigError(f"{text[:40]!r} is not of the form /path")
    if path and (own := hides_own_path(path)):
        raise ConfigError(f"{text[:40]!r} begins {own}, a path of the server itself; choose another")
    return path


def _url(text: str, name: str) -> str:
    if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", text):
        raise ConfigError(f"{text[:40]!r} is not of the form http://example.org:4318")
    return text


def _seconds(default: float, help: str, *, may_be_zero: bool = False) -> float:
    return option(default, help, low=0, high=LONGEST_SECONDS, open_low=not may_be_zero, metavar="SECONDS")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerOptions(EngineConfig):
    """What the server is told: the options of its engine, and its own."""

    model: str = option(
        str(DEMO_MODEL), "checkpoint directory or hub id", metavar="MODEL", default_text="the bundled demo model"
    )
    served_model_name: list[str] | None = option(
        None,
        "names clients may use; the first is in answers",
        metavar="NAME",
        default_text="the last part of --model",
    )
    chat_template_kwargs: dict[str, Any] = option(
        {},
        """variables of the chat template where requests do not set them, such as '{"enable_thinking": false}'""",
        metavar="JSON",
        check=_template_kwargs,
    )
    reasoning_parser: Literal["auto"] | ReasoningForm = option(
        "auto", "how the model's thoughts are told from its answers; auto: as its family or chat template says"
    )
    tool_call_parser: Literal["auto"] | CallForm = option(
        "auto", "how calls of tools are told from the model's answers; auto: as its family or chat template says"
    )
    host: str = option("127.0.0.1", "address to listen on", metavar="HOST")
    port: int = option(8000, "port to listen on; 0 picks a free one", low=0, high=65535, metavar="PORT")
    uds: str | None = option(
        None,
        "Unix domain socket to listen on, instead of --host and --port; its user and group may connect",
        metavar="PATH",
        default_text="no socket",
    )
    root_path: str = option(
        "",
        "where a proxy has the server's paths, for example /llm; it may pass them on with it or without",
        metavar="/PATH",
        check=_root_path,
    )
    max_num_queued_reqs: int = option(
        256, "sequences (prompts times n) that may wait; more are refused with 503", low=0, metavar="N"
    )
    max_stored_responses: int = option(
        MAX_STORED_RESPONSES,
        "responses of /v1/responses that are kept in memory for previous_response_id, the last used; 64 MiB at most",
        low=0,
        metavar="N",
    )
    api_key: list[str] = option(
        [],
        "keys of which a client must send one; those of several keys do not reuse each other's prompts",
        metavar="KEY",
        default_text="no key is asked for",
    )
    allowed_origins: list[str] = option(
        [],
        "web pages that browsers may let call the server (CORS), for example https://example.org; * is all",
        metavar="ORIGIN",
        default_text="none",
        check=_origin,
    )
    allowed_hosts: list[str] = option(
        [],
        "what the Host header of requests may be; * is all",
        metavar="HOST",
        default_text="localhost and its addresses, which stay allowed, while --host is one of them; else all",
        check=_host,
    )
    log_format: LogFormat = option("text", "format of the lines on stderr, one for each request")
    otlp_endpoint: str | None = option(
        None,
        "OpenTelemetry collector that spans go to, one per request, for example http://localhost:4318",
        metavar="URL",
        default_text="no spans",
        check=_url,
    )
    read_timeout: float = _seconds(
        30.0, "seconds in which a client must have sent the head of a request, and then its body"
    )
    send_timeout: float = _seconds(60.0, "seconds in which a client must read on in its answer")
    stream_keep_alive: float = _seconds(
        KEEP_ALIVE_SECONDS,
        "seconds after which a stream that has nothing to say sends a comment, so that no proxy cuts it",
    )
    step_timeout: float = _seconds(
        PATIENCE_SECONDS,
        "seconds without progress, beyond 10 times the longest of the last steps, after which a step hangs: its "
        "requests end, none are taken until it is over, and /health says so; 0 is never",
        may_be_zero=True,
    )
    shutdown_timeout: float = _seconds(
        30.0,
        "seconds that running requests get after SIGTERM or Ctrl-C; a second signal ends the wait",
        may_be_zero=True,
    )


TITLES = {EngineConfig: "engine", ServerOptions: "server"}
"""What classes of options are about."""


def parser(command: str = COMMAND) -> Parser:
    """The command line of the server. `command` is how it was called, for the help text."""
    description = "Serve a Mixture-of-Experts model over an OpenAI-compatible HTTP API."
    made = parser_of(ServerOptions, command, description, TITLES)
    made.add_argument("checkpoint", nargs="?", metavar="MODEL", help="the same as --model")
    return made


def parse_options(arguments: Sequence[str], command: str = COMMAND) -> ServerOptions:
    """Flags win over the file given with `--config`. Exits with status 2 and one line on any mistake.

    `command` is how the server was called, for the help text.
    """
    made = parser(command)
    given = read_values(made, ServerOptions, arguments)
    if (checkpoint := given.pop("checkpoint", None)) is not None:
        if "model" in given:
            made.error("MODEL and --model both say what is served; give one of them")
        given["model"] = checkpoint
    for name in ("host", "port"):
        if given.get("uds") is not None and name in given:
            made.error(f"--uds and --{name} both say where to listen; give one of them")
    try:
        options = ServerOptions(**given)
    except ConfigError as error:  # values that are right one by one, and not together
        made.error(as_flags(str(error)))
    if is_missing(options.model):
        made.error(f"{MISSING} with --model")
    return options


def as_flags(message: str) -> str:
    """An error of the engine with its parameters' names as those of our flags: `max_num_seqs` is `--max-num-seqs`."""
    return flag_names(message, ServerOptions)
