"""Hugging Face checkpoints on disk: reading, checking, writing; and their tokenizers."""

from emoe_jax.checkpoint.checkpoint import Checkpoint
from emoe_jax.checkpoint.tokenizer import Tokenizer

__all__ = ["Checkpoint", "Tokenizer"]
