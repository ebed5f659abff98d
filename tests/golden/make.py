"""Regenerate the golden numbers: `python -m tests.golden.make` (needs the `parity` extra, i.e. torch).

For each configuration of `tiny.py`, transformers loads the checkpoint that `tiny.py` writes (all its tensors, and no
others) and computes logits of two sequences and 32 greedy tokens, in float32 on the CPU. Only these are stored.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden.tiny import CONFIGS, prompts, write_checkpoint

HERE = Path(__file__).parent
GREEDY_TOKENS = 32


def load_transformers(directory: Path) -> Any:
    """The model as transformers loads it, after checking that it found exactly the tensors it expects."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model, info = loaded
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            raise ValueError(f"{directory}: transformers reports {problem}: {info[problem]}")
    return model.eval()


def transformers_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long), use_cache=False).logits.float().numpy()


def transformers_greedy(model: Any, prompt: np.ndarray) -> tuple[np.ndarray, float]:
    """Greedy tokens by full recomputation, and the smallest lead of a chosen token over the next."""
    tokens, lead = list(map(int, prompt)), np.inf
    for _ in range(GREEDY_TOKENS):
        last = transformers_logits(model, np.array([tokens]))[0, -1]
        first, second = np.sort(last)[::-1][:2]
        lead = min(lead, float(first - second))
        tokens.append(int(np.argmax(last)))
    return np.array(tokens[len(prompt) :], np.int32), lead


def main() -> None:
    for name, raw in CONFIGS.items():
        with tempfile.TemporaryDirectory() as directory:
            model = load_transformers(write_checkpoint(Path(directory), raw))
        tokens = prompts(raw)
        logits = transformers_logits(model, tokens)
        greedy, lead = transformers_greedy(model, tokens[0])
        np.savez_compressed(HERE / f"{name}.npz", config=json.dumps(raw), tokens=tokens, logits=logits, greedy=greedy)
        print(f"{name:20} logit std {logits.std():.2f}  smallest greedy lead {lead:.3f}  distinct {len(set(greedy))}")


if __name__ == "__main__":
    main()
