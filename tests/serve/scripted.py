"""An engine that says what it is told, one character per token."""

from emoe_jax.requests.request import Completion, Delta
from emoe_jax.requests.text import TextStream
from tests.serve.fake import EOS, FakeEngine, FakeTokenizer, Running


class ScriptedEngine(FakeEngine):
    """Ends its answer with a token that ends texts, or where the request's limit or a stop string ends it."""

    def __init__(self, says: str):
        super().__init__(FakeTokenizer())
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
