"""Prompts by task for commands that run a model: read from a JSONL file, or drawn by the demo tasks' generators.

    {"task": "qa", "prompt": "Who ...?"}
    {"task": "conv", "messages": [{"role": "user", "content": "Hi"}, ...]}

is a file's lines, in order of arrival; other keys are ignored.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emoe_jax.checkpoint import Tokenizer
from emoe_jax.config import ModelConfig
from emoe_jax.errors import ConfigError, RequestError
from emoe_jax.tasks import OTHER
from train.demo.mixture import answered
from train.tasks import examples, texts
from train.tasks.example import Split

TEXT_TOKENS = 128
"""The longest stretch of a text; the demo model was trained on rows of so many."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One request of a task, as chat messages; the last one is the user's."""

    task: str
    messages: tuple[dict[str, str], ...]

    @property
    def text(self) -> str:
        """All turns, as the engine's classifier sees them."""
        return "\n".join(message["content"] for message in self.messages)

    def token_ids(self, tokenizer: Tokenizer) -> list[int]:
        """Rendered as the server would: by the chat template if there is one. Raises `ConfigError` if it refuses."""
        if not tokenizer.has_chat_template:
            return tokenizer.encode(self.text)
        try:
            return tokenizer.chat(self.messages)
        except RequestError as error:
            raise ConfigError(f"a prompt of {self.task}: {error}") from None


def drawn(tasks: Sequence[str], split: Split, seed: int, count: int) -> list[Prompt]:
    """`count` prompts of each demo task, task after task; those of `facts` are of the task `qa`."""
    chosen = [example for task in tasks for example in examples(task, split, seed, count)]
    return [Prompt(example.task, tuple(example.messages)) for example in chosen]


def stretch(tokenizer: Tokenizer, config: ModelConfig, kind: str, split: Split, key: str) -> list[int]:
    """Token ids of part of a document, or of a chat with all its turns, `TEXT_TOKENS` at most.

    Raises `ImportError` where the package with the texts is not installed.
    """
    if kind == "dialogue":
        messages = answered(texts.dialogue(split, key))
        if tokenizer.has_chat_template:
            return tokenizer.chat(messages, add_generation_prompt=False)[:TEXT_TOKENS]
        text = "\n".join(message["content"] for message in messages)
    else:
        text = texts.passage(kind, split, key, TEXT_TOKENS * 8)
    ids, begin = tokenizer.encode(text), config.bos_token_id
    if begin is not None and ids[:1] != [begin]:
        ids = [begin, *ids]
    return ids[:TEXT_TOKENS]


def read(path: Path) -> list[Prompt]:
    """The prompts of a file. Raises `ConfigError`, one line that names the file's line, where it is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text") from None
    prompts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                raw = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path}:{number} is not JSON: {' '.join(str(error).split())}") from None
            prompts.append(_prompt(raw, f"{path}:{number}"))
    if not prompts:
        raise ConfigError(f"{path} holds no prompts")
    return prompts


def tasks_of(prompts: Sequence[Prompt]) -> list[str]:
    """Their tasks, by name."""
    return sorted({prompt.task for prompt in prompts})


def _prompt(raw: Any, where: str) -> Prompt:
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} is no JSON object")
    task = raw.get("task")
    if not isinstance(task, str) or not task.strip() or task == OTHER:
        raise ConfigError(f"{where}: task is {str(task)[:40]!r}; it must be a name, and {OTHER!r} stands for no task")
    if ("prompt" in raw) == ("messages" in raw):
        raise ConfigError(f"{where} needs either prompt or messages")
    messages = raw.get("messages", [{"role": "user", "content": raw.get("prompt")}])
    fine = isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages)
    if not fine or not all(isinstance(m.get(key), str) for m in messages for key in ("role", "content")):
        raise ConfigError(f"{where}: prompt must be text, and messages a list of objects with role and content")
    if not messages[-1]["content"].strip():
        raise ConfigError(f"{where}: the prompt is empty")
    return Prompt(task, tuple({"role": m["role"], "content": m["content"]} for m in messages))
