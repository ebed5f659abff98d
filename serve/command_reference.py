"""python -m serve.command_reference > docs/reference/command.md: the page of all commands, from their parsers."""

import argparse
import sys
from collections.abc import Iterator

from emoe_jax.engine_config import EngineConfig
from emoe_jax.option_fields import options_of
from serve.commands import Command, leaves
from serve.exits import MEANINGS
from serve.flags import CONFIG
from serve.options import ServerOptions
from serve.reference import escaped, row

COMMAND = "python -m serve.command_reference > docs/reference/command.md"

INTRODUCTION = f"""\
<!-- Made by `{COMMAND}`; do not edit. -->

# Commands

`emoe` is the console script. Each of its commands is a Python module, too, for an environment whose scripts are not
on the path: `emoe plan` is `python -m serve.plan`. `emoe COMMAND --help` prints what this page has.

A mistake in the arguments, in a file or in an address is one line on stderr. Reports go to stdout, and progress goes
to stderr. `--json` prints the report as JSON in place of tables and lines, for every command that prints a report.
`--config FILE` takes any of a command's options from a YAML file.

```sh
emoe serve DIR --expert-memory 40%                      # serve a model
emoe chat DIR                                           # chat with it: uses the server that runs, or starts one
emoe bench serve http://127.0.0.1:8000 --request-rate 4 --slo-ttft-ms 500 --slo-tpot-ms 50
emoe bench kernels DIR                                  # once on each kind of GPU: starts use the fastest tile sizes
emoe predictor train DIR --traces trace.npz             # learn from recorded traffic; the next start uses it
```
"""

NOTES = {
    "emoe chat": """\
A message is a line. Lines may come from a pipe: then answers are plain text, and `--json` makes each a JSON object in
a line. Thoughts of reasoning models are dim at a terminal. While an answer comes, the line below it says what is
resident. After it, one line has its tokens, the time to the first token (TTFT), the time per further token (TPOT),
and contract, task and substituted weight as the answer reports them. Hits, loads and coverage are those of the server
meanwhile, for all its requests. Without a server at http://127.0.0.1:8000 that serves MODEL, one is started on a free
port, with the flags after `--`, and ends with the chat: `emoe chat DIR -- --expert-memory 40%`.

| typed | what it does |
| --- | --- |
| `/system TEXT` | sets the system's message; without a text there is none |
| `/reset` | begins the conversation anew |
| `/task NAME`, `/task auto` | names the task of the messages, or leaves it to the server |
| `/contract NAME` | `resident`, `bounded`, `exact`, or `default`: the server's |
| `/state` | says what is resident now |
| `/quit`, end of input | leaves |
| Ctrl-C | stops the answer; twice leaves |
""",
    "emoe bench latency": "Batches have the engine to themselves, one after the other. All prompts are different.\n",
    "emoe bench kernels": """\
The MoE op's kernels on a GPU cut their work into tiles. Which sizes are fastest depends on the card, on the experts,
and on how many rows an expert has. The command measures some sizes at 1, 8, 24, 48 and 128 rows per expert, changing
one size at a time. It keeps the fastest in `$XDG_CACHE_HOME/emoe-jax/kernels` (`~/.cache` by default), in a file for
this kind of device, this version of JAX, and experts of these shapes and this format. The engine reads the file at
its start, and the table at the server's start says so. A file that is broken, or of something else, is ignored with a
warning. No card has been measured yet, so the defaults are taken from what such kernels use elsewhere.
""",
    "emoe bench serve": """\
The server may be any with OpenAI's chat completions. All requests come at once unless `--request-rate` says how many
come per second. Times count from the arrival of a request, a wait for `--max-concurrency` included. Goodput is the
number of requests per second that keep both objectives; an answer of one token has no time per further token.
Failures are counted by kind, and are in no other number but the share within objectives. Coverage and loads are the
difference between two readings of `/v1/emoe/state`.
""",
    "emoe predictor train": """\
The trace has to be of the model's own routing, and says so by its shape. Training writes to
`MODEL/predictor.training`, and goes on from there when it was killed. The result replaces `MODEL/predictor` when it
is whole. [Serve a model of your own](../how-to/own-model.md) has the steps before.
""",
    "emoe completion": """\
The script is made from the parsers of all commands. It needs the `completion` extra, which `make serve` installs.

| shell | where the script belongs |
| --- | --- |
| bash | `emoe completion bash > ~/.local/share/bash-completion/completions/emoe` |
| zsh | `emoe completion zsh > "${fpath[1]}/_emoe"` |
| fish | `emoe completion fish > ~/.config/fish/completions/emoe.fish` |
""",
}
"""What the parsers do not say."""


def page() -> str:
    """All commands as Markdown."""
    commands = dict(leaves())
    parts = [INTRODUCTION, _statuses(commands), _table(commands)]
    parts += ["\n".join(_section(called, command)) for called, command in commands.items()]
    return "\n".join(parts).rstrip("\n") + "\n"


def _statuses(commands: dict[str, Command]) -> str:
    lines = ["## Exit statuses", "", "| status | meaning |", "| --- | --- |"]
    lines += [f"| {status} | {meaning} |" for status, meaning in MEANINGS.items()]
    lines += ["", "| command | what 1 says | what 3 says |", "| --- | --- | --- |"]
    lines += [
        f"| `{called}` | {one.no} | {one.no_device} |" for called, one in commands.items() if one.no or one.no_device
    ]
    return "\n".join([*lines, ""])


def _table(commands: dict[str, Command]) -> str:
    lines = ["## All commands", "", "| command | what it is for | module |", "| --- | --- | --- |"]
    lines += [
        f"| [`{called}`](#{called.replace(' ', '-')}) | {one.purpose} | `python -m {one.module}` |"
        for called, one in commands.items()
    ]
    return "\n".join([*lines, ""])


def _section(called: str, command: Command) -> Iterator[str]:
    made = command.load().parser(called)
    yield from (f"## {called}", "")
    description = escaped(" ".join((made.description or "").split()))
    yield from (description.replace("{", "\\{"), "")
    if called in NOTES:
        yield NOTES[called]
    given = [action for action in made._actions if not action.option_strings]
    if given:
        yield from ("| argument | meaning |", "| --- | --- |")
        for action in given:
            name = action.metavar or "{" + ",".join(action.choices or ()) + "}"
            yield f"| `{name}` | {_help(action)} |"
        yield ""
    kind = getattr(made, "kind", None)
    if kind is ServerOptions:
        yield from ("[Options](options.md) has its flags.", "")
        return
    flags = [action for action in made._actions if action.option_strings and action.dest != "help"]
    if kind is None:
        if flags:
            yield from ("| flag | meaning |", "| --- | --- |")
            yield from (f"| `{action.option_strings[-1]}` | {_help(action)} |" for action in flags)
    elif own := [option for option in options_of(kind) if option.owner is not EngineConfig]:
        yield from ("| flag | values | default | meaning |", "| --- | --- | --- | --- |")
        yield from map(row, own)
    else:
        return
    yield ""
    if kind is not None and issubclass(kind, EngineConfig):
        yield from (
            f"It also takes the [options of the engine](options.md#options-of-the-engine), and `{CONFIG} FILE`.",
            "",
        )


def _help(action: argparse.Action) -> str:
    return escaped((action.help or "").replace("%%", "%"))


if __name__ == "__main__":
    sys.stdout.write(page())
