"""An engine that says what it is told, one character per token."""

from collections.abc import Mapping
from typing import Any

from emoe_jax.requests.request import Completion, Delta
from emoe_jax.requests.text import TextStream
from tests.serve.fake import EOS, FakeEngine, FakeTokenizer, Running


class Tagging(FakeTokenizer):
    """Has special tokens of its own, and a template that ends prompts in `ending`."""

    def __init__(self, special: Mapping[str, int], ending: str = ""):
        self._special = special
        self._ending = ending

    def special_id(self, token: str) -> int | None:
        return self._special.get(token)

    def chat(self, *args: Any, **kwargs: Any) -> list[int]:
        return super().chat(*args, **kwargs) + self.encode(self._ending, add_special_tokens=False)


class ScriptedEngine(FakeEngine):
    """Ends its answer with a token that ends texts, or where the request's limit or a stop string ends it."""

    def __init__(self, says: str, tokenizer: FakeTokenizer | None = None):
        super().__init__(tokenizer or FakeTokenizer())
        self.says = says

    def _advance(self, running: Running, completion: Completion, stream: TextStream) -> Delta:
        at = len(completion.token_ids)
        token = ord(self.says[at]) if at < len(self.says) else EOS
        completion.token_ids.append(token)
        text = ""
        if token == EOS:
            completion.finish_reason = "stop"
        else:
            text, stopped = stream.add(token)
            if stopped:
                completion.finish_reason, completion.stop_string = "stop", stream.stopped_by
            elif len(completion.token_ids) == running.params.max_tokens:
                completion.finish_reason = "length"
        if completion.finish_reason is not None:
            text += stream.flush()
        completion.text += text
        return Delta(running.output.request_id, completion.index, text, (token,), (), completion.finish_reason)
