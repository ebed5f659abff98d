"""Command line and configuration file of the server."""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

from emoe_jax.checkpoint.chat_template import RESERVED
from emoe_jax.errors import ConfigError
from emoe_jax.memory.budget import parse_expert_memory
from emoe_jax.memory.plan import parse_bandwidth, parse_bytes
from emoe_jax.policies import POLICIES
from emoe_jax.requests.request import RoutingContract
from emoe_jax.scheduling.registry import SCHEDULING_POLICIES
from emoe_jax.scheduling.registry import VARIANTS as SCHEDULING_VARIANTS
from serve.logs import LogFormat
from serve.paths import hides_own_path
from serve.stream import KEEP_ALIVE_SECONDS

REPOSITORY = Path(__file__).resolve().parents[1]
DEMO_MODEL = REPOSITORY / "checkpoints" / "demo"
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000


@dataclasses.dataclass(frozen=True)
class Options:
    """One field per flag."""

    model: str
    served_model_name: list[str] | None
    chat_template: str | None
    chat_template_kwargs: dict[str, Any]
    generation_config: str
    host: str
    port: int
    uds: str | None
    root_path: str
    dtype: str
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int
    scheduling_policy: str
    max_num_queued_reqs: int
    expert_memory: str
    host_memory: str
    device_memory: str | None
    memory_trade: bool
    prefix_caching: bool
    overlap: bool
    routing: RoutingContract
    policy: str
    task_profile: str
    predictor: str
    predict_every: int | Literal["auto"]
    link_bandwidth: str | None
    load_wait_ms: int
    record_traces: str | None
    record_prompt_tokens: bool
    api_key: list[str]
    allowed_origins: list[str]
    allowed_hosts: list[str]
    seed: int
    log_format: LogFormat
    otlp_endpoint: str | None
    read_timeout: float
    send_timeout: float
    stream_keep_alive: float
    shutdown_timeout: float


class _Help(argparse.HelpFormatter):
    """Adds the default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        has_default = action.default not in (None, [], {}, argparse.SUPPRESS) and "%(default)s" not in (
            action.help or ""
        )
        return (action.help or "") + (" (default: %(default)s)" if has_default else "")


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, without the usage text."""

    where = ""
    """What goes before a message: the file that arguments are from."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {self.where}{message}", file=sys.stderr)
        raise SystemExit(2)


def parse_options(arguments: Sequence[str]) -> Options:
    """Flags win over the file given with `--config`. Exits with status 2 and one line on any mistake."""
    parser = _build_parser()
    arguments = _join_negatives(arguments)
    given, _ = parser.parse_known_args(arguments)
    if given.config is not None:
        arguments = [*_config_arguments(parser, Path(given.config)), *arguments]
    values = vars(parser.parse_args(arguments))
    values |= {name: value for name, value in vars(given).items() if isinstance(value, list) and value}
    del values["config"]
    if values["model"] is None:
        if not (DEMO_MODEL / "config.json").is_file():
            parser.error(f"there is no bundled demo model at {DEMO_MODEL}; name one with --model")
        values["model"] = str(DEMO_MODEL)
    if values["uds"] is not None:
        for name in ("host", "port"):
            if values[name] is not None:
                parser.error(f"--uds and --{name} both say where to listen; give one of them")
    values["host"] = DEFAULT_HOST if values["host"] is None else values["host"]
    values["port"] = DEFAULT_PORT if values["port"] is None else values["port"]
    return Options(**values)


def as_flags(message: str) -> str:
    """An error of the engine with its parameters' names as those of our flags: `max_num_seqs` is `--max-num-seqs`."""
    names = [field.name for field in dataclasses.fields(Options) if "_" in field.name]
    pattern = rf"(?<![\w/.-])({'|'.join(names)}|expert memory)(?![\w/.-])"
    return re.sub(pattern, lambda match: "--" + re.sub("[_ ]", "-", match[0]), message)


def _build_parser() -> _Parser:
    parser = _Parser(
        prog="python -m serve.main",
        description="Serve a Mixture-of-Experts model over an OpenAI-compatible HTTP API.",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", type=_name, help="checkpoint directory or hub id (default: the bundled demo model)")
    add(
        "--served-model-name",
        nargs="+",
        action="extend",
        type=_name,
        metavar="NAME",
        help="names clients may use; the first is in answers (default: the last part of --model)",
    )
    add(
        "--chat-template",
        type=_name,
        metavar="FILE",
        help="chat template to use instead of the model's own, or the name of one of several that it has",
    )
    add(
        "--chat-template-kwargs",
        type=_template_kwargs,
        default={},
        metavar="JSON",
        help="""variables of the chat template where requests do not set them, such as '{"enable_thinking": false}'""",
    )
    add(
        "--generation-config",
        choices=("auto", "none"),
        default="auto",
        help="sampling defaults of requests: those of the model's generation_config.json, or none of them",
    )
    add("--host", help=f"address to listen on (default: {DEFAULT_HOST})")
    add("--port", type=_integer(0, 65535), help=f"port to listen on; 0 picks a free one (default: {DEFAULT_PORT})")
    add(
        "--uds",
        type=_name,
        metavar="PATH",
        help="Unix domain socket to listen on, instead of --host and --port; its user and group may connect",
    )
    add(
        "--root-path",
        type=_root_path,
        default="",
        metavar="/PATH",
        help="where a proxy has the server's paths, for example /llm; it may pass them on with it or without",
    )
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="dtype of weights and slab")
    add("--max-model-len", type=_integer(1), help="context length (default: the model's own)")
    add("--max-num-seqs", type=_integer(1, 4096), default=16, help="sequences computed together")
    add("--max-num-batched-tokens", type=_integer(1, 2**20), default=512, help="tokens computed in one step")
    add(
        "--scheduling-policy",
        choices=SCHEDULING_POLICIES + SCHEDULING_VARIANTS,
        metavar="{" + ",".join(SCHEDULING_POLICIES) + "}",
        default="slo",
        help="who starts next: by deadlines and expected work, or first come first served; slo-without-PART is for "
        "measuring what a part of slo is worth",
    )
    add(
        "--max-num-queued-reqs",
        type=_integer(0),
        default=256,
        help="sequences (prompts times n) that may wait; more are refused with 503",
    )
    add(
        "--expert-memory",
        type=_amount,
        default="40%",
        metavar="SIZE",
        help="memory for experts: 40%%, 6GiB or '8 slots' per layer",
    )
    add(
        "--host-memory",
        type=_bytes_or_auto,
        default="auto",
        metavar="SIZE",
        help="host memory that may keep experts off the device, for example 90GiB, or 0 (default: all of them, in at "
        "most half of the machine's memory)",
    )
    add(
        "--device-memory",
        type=_bytes,
        metavar="SIZE",
        help="device memory for weights, experts, KV cache and workspace together (default: what is free of it; on "
        "CPU, the memory of the machine or container)",
    )
    add(
        "--memory-trade",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="whether experts make room for the KV cache while requests lack it; compiles for both at the start",
    )
    add(
        "--prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether prompts reuse what the KV cache has of their first tokens",
    )
    add(
        "--overlap",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether the host prepares a step while the device computes the one before",
    )
    add("--routing", choices=("resident", "exact"), default="resident", help="routing of requests that name none")
    add("--policy", choices=sorted(POLICIES), default="emoe", help="which experts are kept on the device")
    add(
        "--task-profile",
        default="auto",
        metavar="FILE",
        help="tells tasks by keywords; auto is the model's own; or none",
    )
    add(
        "--predictor",
        default="auto",
        metavar="DIR",
        help="tells which experts a prompt will use; auto is the model's own; or none",
    )
    add(
        "--predict-every",
        type=_integer_or_auto(1),
        default="auto",
        metavar="P",
        help="prompts that share a prediction, counted as they are admitted: 1 is a prediction for every prompt; auto "
        "(the default) is what pays, by measured cost and gain, and 40 with --policy emoe-paper",
    )
    add(
        "--link-bandwidth",
        type=_bandwidth,
        metavar="SIZE",
        help="bytes per second that background loads may take, for example 2GiB",
    )
    add(
        "--load-wait-ms",
        type=_integer(0, 60_000),
        default=50,
        help="milliseconds that a prompt waits for its prediction and its planned experts while nothing else runs",
    )
    add("--record-traces", metavar="FILE.npz", help="record the routing of all requests here")
    add(
        "--record-prompt-tokens",
        action="store_true",
        help="with --record-traces: also the token ids of their prompts, which the predictor learns to read",
    )
    add(
        "--api-key",
        nargs="+",
        action="extend",
        type=_name,
        default=[],
        metavar="KEY",
        help="keys of which a client must send one; those of several keys do not reuse each other's prompts",
    )
    add(
        "--allowed-origins",
        nargs="+",
        action="extend",
        type=_origin,
        default=[],
        metavar="ORIGIN",
        help="web pages that browsers may let call the server (CORS), for example https://example.org; * is all",
    )
    add(
        "--allowed-hosts",
        nargs="+",
        action="extend",
        type=_host,
        default=[],
        metavar="HOST",
        help="what the Host header of requests may be; * is all (default: localhost and its addresses, which stay "
        "allowed, while --host is one of them; else all)",
    )
    add("--seed", type=_integer(0, 2**63 - 1), default=0, help="seed of requests that name none")
    add("--log-format", choices=("text", "json"), default="text", help="of lines on stderr, one for each request")
    add(
        "--otlp-endpoint",
        type=_url,
        metavar="URL",
        help="OpenTelemetry collector that spans go to, one per request, for example http://localhost:4318",
    )
    add(
        "--read-timeout",
        type=_timeout,
        default=30.0,
        help="seconds in which a client must have sent the head of a request, and then its body",
    )
    add(
        "--send-timeout",
        type=_timeout,
        default=60.0,
        help="seconds in which a client must read on in its answer",
    )
    add(
        "--stream-keep-alive",
        type=_timeout,
        default=KEEP_ALIVE_SECONDS,
        help="seconds after which a stream that has nothing to say sends a comment, so that no proxy cuts it",
    )
    add(
        "--shutdown-timeout",
        type=_seconds,
        default=30.0,
        help="seconds that running requests get after SIGTERM or Ctrl-C; a second signal ends the wait",
    )
    add("--config", metavar="FILE", help="YAML file with any of these options, by the same names")
    return parser


def _integer(low: int, high: int | None = None) -> Callable[[str], int]:
    bounds = f"at least {low}" if high is None else f"between {low} and {high}"

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not an integer {bounds}")
        return value

    return convert


def _integer_or_auto(low: int) -> Callable[[str], int | str]:
    integer = _integer(low)

    def convert(text: str) -> int | str:
        try:
            return text if text == "auto" else integer(text)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{error}, nor auto") from None

    return convert


def _amount(text: str) -> str:
    """An amount of memory as the engine reads it, refused here if it is none."""
    try:
        amount = parse_expert_memory(text, "the amount")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not amount.amount:
        raise argparse.ArgumentTypeError(f"{text!r} is nothing; the model needs at least its top-k experts per layer")
    return text


def _bytes(text: str) -> str:
    try:
        parse_bytes("the amount", text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _bytes_or_auto(text: str) -> str:
    return text if text == "auto" else _bytes(text)


def _bandwidth(text: str) -> str:
    try:
        parse_bandwidth(text, "the amount")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _name(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty text is none")
    return text


def _template_kwargs(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text[:40]!r} is not a JSON object such as {{"enable_thinking": false}}')
    for name in RESERVED:
        if name in value:
            raise argparse.ArgumentTypeError(f"cannot set {name}")
    return value


def _origin(text: str) -> str:
    if text != "*" and not re.fullmatch(r"https?://[^/\s]+", text):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is neither * nor of the form https://example.org")
    return text


def _host(text: str) -> str:
    if text != "*" and not re.fullmatch(r"[\w.-]+|\[[0-9a-fA-F:.]+\]", text):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is neither * nor a name or address without port")
    return text.lower()


def _root_path(text: str) -> str:
    path = text.rstrip("/")
    if path and not re.fullmatch(r"(/[\w.~-]+)+", path, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not of the form /path")
    if path and (own := hides_own_path(path)):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} begins {own}, a path of the server itself; choose another")
    return path


def _url(text: str) -> str:
    if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", text):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not of the form http://example.org:4318")
    return text


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number of seconds between 0 and 86400")
    return value


def _timeout(text: str) -> float:
    value = _seconds(text)
    if not value:
        raise argparse.ArgumentTypeError("0 seconds are too few for any request; expected more, up to 86400")
    return value


def _join_negatives(arguments: Sequence[str]) -> list[str]:
    """`--flag -5%` as `--flag=-5%`, so that the value is refused and not taken for another flag."""
    joined: list[str] = []
    for argument in arguments:
        if re.match(r"-[0-9.]", argument) and joined and re.fullmatch(r"--[a-z-]+", joined[-1]):
            joined[-1] += "=" + argument
        else:
            joined.append(argument)
    return joined


def _config_arguments(parser: _Parser, path: Path) -> list[str]:
    """The file as command-line arguments, so that both are checked by the same rules."""
    parser.where = f"--config {path}: "
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        parser.error(getattr(error, "strerror", None) or "not a UTF-8 text file")
    except yaml.YAMLError as error:
        parser.error(f"not valid YAML: {' '.join(str(error).split())}")
    content = {} if content is None else content
    if not isinstance(content, dict):
        parser.error(f"expected a mapping of options, found {type(content).__name__}")
    known = {field.name: field.type for field in dataclasses.fields(Options)}
    arguments: list[str] = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            parser.error(f"unknown option {str(key)!r}")
        flag = name.replace("_", "-")
        if value is None:
            continue
        if known[name] is not bool:
            arguments += _as_arguments(f"--{flag}", value)
        elif isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            parser.error(f"{flag} is {str(value)[:40]!r}; expected true or false")
    parser.parse_args(arguments)  # what is wrong with them is the file's mistake
    parser.where = ""
    return arguments


def _as_arguments(flag: str, value: Any) -> list[str]:
    if isinstance(value, list):
        return [flag, *map(str, value)]
    if isinstance(value, dict):
        value = json.dumps(value)
    return [f"{flag}={value}"]
