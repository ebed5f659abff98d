"""What all request bodies are."""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError


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
