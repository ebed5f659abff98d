"""The decoder, one file per family for what differs between architectures, and their checkpoints in and out."""

from emoe_jax.models.families import families, family_named, family_of
from emoe_jax.models.loading import (
    config_from_directory,
    config_from_hf,
    load_dense,
    load_tokenizer,
    open_checkpoint,
    save_checkpoint,
)

__all__ = [
    "config_from_directory",
    "config_from_hf",
    "families",
    "family_named",
    "family_of",
    "load_dense",
    "load_tokenizer",
    "open_checkpoint",
    "save_checkpoint",
]
