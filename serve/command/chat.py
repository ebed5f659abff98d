"""`emoe chat [URL or MODEL]`: a chat at the terminal, with what each answer cost and what is resident."""

import contextlib
import dataclasses
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console

from emoe_jax.demo import MISSING, demo_model, is_missing
from emoe_jax.errors import ConfigError, one_line
from emoe_jax.option_fields import Options, option
from emoe_jax.requests.contract import CONTRACTS, RoutingContract
from serve.command.background import URL, served_by, started
from serve.command.conversation import TIMEOUT, Asking, ChatFailed, Conversation
from serve.command.screen import AsJson, Plain, Screen, Terminal
from serve.command.served_state import residency_line
from serve.exits import INTERRUPTED, NO, OK, status_of
from serve.flags import Parser, flag_names, parser_of, read_values

COMMAND = "python -m serve.command.chat"
HELP = (
    "/system TEXT, /reset, /task NAME or auto, /contract resident, bounded, exact or default, /state, /quit; Ctrl-C "
    "stops an answer, twice leaves"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatOptions(Options):
    """What `emoe chat` is told, beside the server or the model."""

    system: str | None = option(None, "the first message, of the system", metavar="TEXT", default_text="none")
    task: str | None = option(None, "task of the messages", metavar="NAME", default_text="as the server finds it")
    routing: RoutingContract | None = option(None, "routing contract of the answers", default_text="the server's")
    max_tokens: int | None = option(
        None, "tokens of an answer, at most", low=1, metavar="TOKENS", default_text="what the context has room for"
    )
    temperature: float | None = option(None, "of the answers", low=0, high=100, default_text="the server's")
    api_key: str | None = option(None, "key of the server", metavar="KEY", default_text="none is sent")
    json: bool = option(False, "whether to print one JSON object for each answer, in a line")


def parser(command: str = COMMAND) -> Parser:
    """The command line."""
    description = (
        f"Chat with a server. A message is a line; lines may come from a pipe. Commands: {HELP}. After `--` come flags "
        "of the server that is started where none serves MODEL. The exit status is 1 where a message had no answer."
    )
    made = parser_of(ChatOptions, command, description, {ChatOptions: "chat"})
    made.add_argument(
        "target",
        nargs="?",
        metavar="TARGET",
        help=f"address of a server, or a model to start one for (default: {URL}, else the demo)",
    )
    return made


def main(arguments: Sequence[str] | None = None, command: str = COMMAND) -> int:
    """Chat until the end of the input; the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    end = words.index("--") if "--" in words else len(words)
    given = read_values(parser(command), ChatOptions, words[:end])
    target = given.pop("target", None)
    return status_of(
        lambda: _run(target, ChatOptions(**given), words[end + 1 :]), lambda text: flag_names(text, ChatOptions)
    )


def _run(target: str | None, options: ChatOptions, server_arguments: Sequence[str]) -> int:
    import httpx

    notes = console_of(sys.stderr)
    with _server(target, options.api_key, server_arguments, notes) as url:
        headers = {} if options.api_key is None else {"Authorization": f"Bearer {options.api_key}"}
        with httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT, trust_env=False) as http:
            served = served_by(url, options.api_key)
            asking = Asking(
                model="" if served is None else served.names[0],
                tasks=None if served is None else served.tasks,
                system=options.system,
                task=options.task,
                routing=options.routing,
                max_tokens=options.max_tokens,
                temperature=options.temperature,
            )
            if options.task is not None:
                asking.check_task(options.task, "--task")
            conversation = Conversation(http, asking)
            if sys.stdin.isatty():
                notes.print(f"{url}: {HELP}", style="dim", markup=False, highlight=False)
            return converse(conversation, screen_of(options, notes), lines(sys.stdin.isatty()))


def screen_of(options: ChatOptions, notes: Console) -> Screen:
    """Where answers go, by the options and by what stdout is."""
    if options.json:
        return AsJson(notes)
    return (Terminal if sys.stdout.isatty() else Plain)(console_of(sys.stdout))


def console_of(file: TextIO) -> Console:
    """Wraps lines at the width of a terminal, and nowhere else."""
    return Console(file=file, soft_wrap=not file.isatty())


@contextlib.contextmanager
def _server(target: str | None, api_key: str | None, arguments: Sequence[str], notes: Console) -> Iterator[str]:
    """The address of the server that was named, of one that serves the model, or of one that is started for it."""
    if target is not None and re.match(r"https?://", target):
        url = target.rstrip("/").removesuffix("/v1")
        if served_by(url, api_key) is None:
            raise ChatFailed(f"no server answers at {url}; give a model to start one, or `emoe serve`")
        if arguments:
            raise ConfigError(f"flags after -- are for a server that is started; {url} runs")
        yield url
        return
    model = str(demo_model()) if target in (None, "demo") else target
    if is_missing(model):
        raise ConfigError(MISSING)
    try:
        served = served_by(URL, api_key)
    except ChatFailed:  # one that asks for a key is none that this chat could mean
        served = None
    if served is not None and not arguments and (target is None or Path(model).resolve().name in served.names):
        notes.print(f"a server runs at {URL}: {', '.join(served.names)}", style="dim", markup=False, highlight=False)
        yield URL
        return
    keys = [] if api_key is None else ["--api-key", api_key]
    with started(model, [*keys, *arguments], notes) as url:
        yield url


def lines(is_person: bool) -> Iterator[str | None]:
    """What is typed, or comes from a pipe; None for a Ctrl-C."""
    if is_person:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # edits and remembers what is typed
    while True:
        try:
            line = input("> ") if is_person else sys.stdin.readline()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            yield None
            continue
        if not is_person and not line:
            return
        yield line.rstrip("\n")


def converse(conversation: Conversation, screen: Screen, given: Iterable[str | None]) -> int:
    """Answer each line; the exit status. Two interruptions in a row leave."""
    status, interrupted = OK, False
    for line in given:
        if line is None:
            if interrupted:
                return INTERRUPTED
            interrupted = True
            screen.say("Ctrl-C again, or /quit, leaves")
            continue
        interrupted = False
        text = line.strip()
        if text == "/quit":
            return status
        if text.startswith("/"):
            screen.say(obey(conversation, text))
        elif text:
            try:
                interrupted = not answer(conversation, screen, line)
            except ChatFailed as error:
                status = NO
                screen.fail(one_line(error))
    return status


def answer(conversation: Conversation, screen: Screen, text: str) -> bool:
    """Show the answer to a message; whether it was not interrupted. Raises `ChatFailed`."""
    whole = True
    pieces = conversation.ask(text)
    try:
        screen.show(pieces, lambda: residency_line(conversation.state()))
    except KeyboardInterrupt:
        whole = False
    finally:
        pieces.close()
    screen.end(conversation.answer, residency_line(conversation.state()))
    return whole


def obey(conversation: Conversation, text: str) -> str:
    """Do what a line that begins with a slash says; what there is to say of it."""
    command, _, rest = text.partition(" ")
    asking, rest = conversation.asking, rest.strip()
    if command == "/system":
        asking.system = rest or None
        return "the system says nothing" if asking.system is None else "the system says it from the next message on"
    if command == "/reset":
        conversation.messages.clear()
        return "the conversation begins anew"
    if command == "/task" and rest:
        try:
            asking.task = None if rest == "auto" else asking.check_task(rest)
        except ConfigError as error:
            return f"{error}, or auto"
        return f"task: {rest}"
    if command == "/contract" and rest:
        if rest not in (*CONTRACTS, "default"):
            return f"{rest[:40]!r} is no contract; there are {', '.join(CONTRACTS)} and default"
        asking.routing = None if rest == "default" else rest
        return f"contract: {rest}"
    if command == "/state":
        return residency_line(conversation.state()) or "the server has no /v1/emoe/state"
    return HELP if command == "/help" else f"{text[:40]!r} is no command; there are {HELP}"


if __name__ == "__main__":
    sys.exit(main())
