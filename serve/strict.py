"""What all request bodies are."""

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """No coercion ("5" is not 5, true is not 1), no NaN or infinity, unknown fields ignored as vLLM does."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")
