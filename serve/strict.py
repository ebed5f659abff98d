"""What all request bodies are."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from emoe_jax.errors import RequestError

Refused = Mapping[str, tuple[Any, ...]]


class StrictModel(BaseModel):
    """No coercion ("5" is not 5, true is not 1), no NaN or infinity, unknown fields ignored as vLLM does."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")


class ClosedModel(StrictModel):
    """Unknown fields are refused, with those that are known."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, data: Any) -> Any:
        known = [field.alias or name for name, field in cls.model_fields.items()]
        unknown = [name for name in data if name not in known] if isinstance(data, dict) else []
        if unknown:
            reason = PydanticCustomError(
                "unknown_field", "is no known field; expected one of {known}", {"known": ", ".join(known)}
            )
            error = InitErrorDetails(type=reason, loc=(unknown[0],), input=None)
            raise ValidationError.from_exception_data(cls.__name__, [error])
        return data


class RefusingModel(StrictModel):
    """Refuses what a client may expect of the API, and would not get, by name."""

    refused: ClassVar[Refused] = {}
    """Parameters that exist elsewhere but not here, and the values (besides null) that ask for nothing."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name, neutral in cls.refused.items():
                value = data.get(name)
                if value is not None and value not in neutral:
                    raise RequestError(f"{name} is not supported by this server", name, code="unsupported_parameter")
        return data
