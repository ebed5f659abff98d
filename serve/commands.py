"""The commands of `emoe`, as a tree: what each is for, which module runs it, and what its exit statuses say."""

import dataclasses
import difflib
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from serve.exits import MISTAKE, OK


@dataclasses.dataclass(frozen=True)
class Command:
    """A command that a module runs, or a group of commands."""

    purpose: str
    module: str = ""
    """It has `main(arguments, command)`, which returns the exit status, and `parser(command)`. `command` is how it was
    called. Imported when it is called: that takes a moment. Empty for a group."""
    parts: Mapping[str, "Command"] = dataclasses.field(default_factory=dict)
    """Of a group, by name."""
    no: str = ""
    """What the exit status 1 says; empty where the command never has it."""
    no_device: str = ""
    """What the exit status 3 says; empty likewise."""

    def load(self) -> Any:
        """The module."""
        return importlib.import_module(self.module)


COMMANDS = {
    "serve": Command("serve a model over an OpenAI-compatible HTTP API", "serve.main"),
    "chat": Command("chat at the terminal", "serve.command.chat", no="a message had no answer"),
    "plan": Command(
        "what a model needs of a device, and how fast it is there at best",
        "serve.plan",
        no="the model does not fit, or misses an objective",
    ),
    "doctor": Command(
        "what of this machine would keep the server from running well", "serve.doctor", no="there is a problem"
    ),
    "bench": Command(
        "measure an engine, a running server, or the kernels",
        parts={
            "latency": Command("how long a batch takes that has an engine to itself", "benchmarks.bench.latency"),
            "throughput": Command("what an engine computes per second at most", "benchmarks.bench.throughput"),
            "kernels": Command(
                "choose the tile sizes of the MoE kernels on this device",
                "benchmarks.bench.kernels",
                no_device="there is no NVIDIA GPU",
            ),
            "serve": Command(
                "a running server under load",
                "benchmarks.bench.serve",
                no="no request was answered, or the server failed under some",
            ),
        },
    ),
    "traces": Command(
        "routing traces: record, look into, check, convert",
        parts={
            "record": Command("run prompts through a model and record their routing", "train.traces"),
            "info": Command("what a trace holds, by task", "serve.command.traces.info"),
            "check": Command(
                "whether files are traces, of this model", "serve.command.traces.check", no="a file is not"
            ),
            "convert": Command("write a trace anew, whole or in part", "serve.command.traces.convert"),
            "recover": Command("finish the trace of a process that was killed", "serve.command.traces.recover"),
        },
    ),
    "predictor": Command(
        "the expert predictor of a model of your own",
        parts={
            "train": Command("learn from recorded traffic what `emoe serve` finds", "serve.command.predictor.train"),
            "evaluate": Command("judge a model's predictor on later traffic", "serve.command.predictor.evaluate"),
        },
    ),
    "completion": Command("completion of commands and flags for a shell", "serve.command.completion"),
}


def leaves(commands: Mapping[str, Command] = COMMANDS, prefix: str = "emoe") -> Iterator[tuple[str, Command]]:
    """Every command that runs something, by how it is called."""
    for name, command in commands.items():
        called = f"{prefix} {name}"
        yield from leaves(command.parts, called) if command.parts else [(called, command)]


def dispatch(called: str, commands: Mapping[str, Command], arguments: Sequence[str], more: Sequence[str] = ()) -> int:
    """Run the command that the first argument names; its exit status, 2 where there is none of this name.

    `called` is what was typed before. `more` are lines for the help text.
    """
    name, *rest = arguments or [""]
    if name in ("-h", "--help"):
        print(f"usage: {called} COMMAND ...\n")
        width = max(map(len, commands))
        for known, command in commands.items():
            print(f"  {known:<{width}}  {command.purpose}")
        print("\n".join([*more, "", f"`{called} COMMAND --help` lists a command's flags."]))
        return OK
    if name in commands:
        command = commands[name]
        if command.parts:
            return dispatch(f"{called} {name}", command.parts, rest)
        return command.load().main(rest, f"{called} {name}") or OK
    problem = f"{called} needs a command"
    if name:
        close = difflib.get_close_matches(name, commands, n=1)
        problem = f"{called} has no command {name[:40]!r}" + (f", did you mean {close[0]!r}?" if close else "")
    print(f"error: {problem}; expected one of {', '.join(commands)}, or --help", file=sys.stderr)
    return MISTAKE
