"""What a request says about the chat template: vLLM's fields, for `/v1/chat/completions` and `/tokenize`."""

from typing import Any

from pydantic import model_validator

from emoe_jax.errors import RequestError
from serve.tools import ToolsRequest


class TemplateRequest(ToolsRequest):
    """Without `add_generation_prompt`, the assistant's turn is begun unless the last message is continued."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the template, for example `{"enable_thinking": false}`. Their text never becomes special tokens."""

    @model_validator(mode="after")
    def _check_generation_prompt(self) -> "TemplateRequest":
        if self.continue_final_message and self.add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt cannot both be true", param="continue_final_message"
            )
        return self

    def template_arguments(self) -> dict[str, Any]:
        """What `TextCodec.chat` takes besides the messages."""
        continued = bool(self.continue_final_message)
        begun = not continued if self.add_generation_prompt is None else self.add_generation_prompt
        return {
            "add_generation_prompt": begun,
            "continue_final_message": continued,
            "kwargs": self.chat_template_kwargs or {},
            "tools": self.template_tools(),
        }
