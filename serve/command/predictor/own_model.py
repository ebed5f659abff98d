"""The model of one's own that a predictor is for: its directory, and whether a trace is of its routing."""

from pathlib import Path

from emoe_jax.errors import CheckpointError, ConfigError
from emoe_jax.models import config_from_directory
from emoe_jax.residency.knowledge import PREDICTOR_FOLDER
from emoe_jax.traces import RoutingTrace


def directory_of(model: str) -> Path:
    """Raises `CheckpointError` for what is no directory: the server finds a predictor in none but that of the model."""
    directory = Path(model).expanduser()
    if not directory.is_dir():
        raise CheckpointError(
            f"{model} is no directory; expected that of the checkpoint, in which the server looks for the predictor"
        )
    return directory


def predictor_of(directory: Path) -> Path:
    """Where the server finds the predictor of a model."""
    return directory / PREDICTOR_FOLDER


def check_trace(trace: Path, directory: Path) -> None:
    """Raise an `EmoeError` where the file is no trace of the model's routing, or holds fewer than two prompts."""
    config = config_from_directory(directory, quiet=True)
    found = RoutingTrace.load(trace)
    found.check_model(len(config.moe_layers), config.num_experts, config.top_k, f"the model in {directory}")
    if found.num_prompts < 2:
        raise ConfigError(f"{trace} holds {found.num_prompts} prompt(s); record more traffic, 500 prompts are a start")
