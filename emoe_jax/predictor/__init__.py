"""Which experts will a prompt need? A closed-form prior from remembered prompts, corrected by a small transformer."""

from emoe_jax.predictor.config import PredictorConfig, PredictorError
from emoe_jax.predictor.predictor import Predictor
from emoe_jax.predictor.prompts import Prompts

__all__ = ["Predictor", "PredictorConfig", "PredictorError", "Prompts"]
