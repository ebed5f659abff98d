"""Hugging Face checkpoints on disk: reading, checking, writing."""

from emoe_jax.checkpoint.checkpoint import Checkpoint
from emoe_jax.checkpoint.save import save_checkpoint

__all__ = ["Checkpoint", "save_checkpoint"]
