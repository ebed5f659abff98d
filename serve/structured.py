"""What a request says that its answer has to match: OpenAI's `response_format`, and vLLM's names new and old."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from emoe_jax.errors import RequestError
from emoe_jax.requests.structured_params import StructuredOutputsParams
from serve.strict import ClosedModel, StrictModel

Schema = str | dict[str, Any]
MAX_CHOICES = 4096

Choice = Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]


class JsonSchemaFormat(StrictModel):
    """`name`, `description` and `strict` change nothing: schemas are always kept to."""

    name: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")


class ResponseFormat(StrictModel):
    """OpenAI's."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise RequestError("response_format needs json_schema for its type", param="response_format.json_schema")
        return self


class StructuredOutputs(ClosedModel):
    """vLLM's. Here unknown fields are refused."""

    json_schema: Schema | None = Field(None, alias="json")
    regex: str | None = None
    choice: Choice | None = None
    grammar: str | None = None
    json_object: bool | None = None


class StructuredRequest(StrictModel):
    """The fields of a request that say what its answer has to match; at most one of them."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: Choice | None = None
    guided_grammar: str | None = None

    def to_structured_outputs(self) -> StructuredOutputsParams | None:
        """None when anything may be answered. Raises `RequestError` when several fields say what."""
        given: dict[str, dict[str, Any]] = {}
        if self.response_format is not None and self.response_format.type != "text":
            schema = self.response_format.json_schema
            given["response_format"] = {"json_object": True} if schema is None else {"json": schema.json_schema}
        if self.structured_outputs is not None:
            given["structured_outputs"] = self.structured_outputs.model_dump(by_alias=True)
        for kind in ("json", "regex", "choice", "grammar"):
            if (value := getattr(self, f"guided_{kind}")) is not None:
                given[f"guided_{kind}"] = {kind: value}
        if not given:
            return None
        param, *others = given
        if others:
            raise RequestError(f"{param} and {others[0]} both say what to answer; give one of them", param=others[0])
        return StructuredOutputsParams(**given[param], param=param)
