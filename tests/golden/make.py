"""Regenerate the golden numbers: `python -m tests.golden.make` (needs the `parity` extra, i.e. torch).

For each configuration of `tiny.py`, transformers loads the checkpoint that `tiny.py` writes (all its tensors, and no
others) and computes logits of two sequences and 32 greedy tokens, in float32 on the CPU. Only these are stored.
OpenMoE, which transformers does not have, comes from `openmoe_numpy.py`.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden import openmoe_numpy
from tests.golden.tiny import CONFIGS, OPENMOE, fuse, prompts, random_tensors, write_checkpoint

HERE = Path(__file__).parent
GREEDY_TOKENS = 32


def load_transformers(directory: Path) -> Any:
    """The model as transformers loads it, after checking that it found exactly the tensors it expects."""
    import torch  # pyright: ignore[reportMissingImports]
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
    import torch  # pyright: ignore[reportMissingImports]

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


def make_transformers(name: str, raw: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        model = load_transformers(write_checkpoint(Path(directory), raw))
    tokens = prompts(raw)
    logits = transformers_logits(model, tokens)
    greedy, lead = transformers_greedy(model, tokens[0])
    np.savez_compressed(HERE / f"{name}.npz", config=json.dumps(raw), tokens=tokens, logits=logits, greedy=greedy)
    print(f"{name:20} logit std {logits.std():.2f}  smallest greedy lead {lead:.3f}  distinct {len(set(greedy))}")


def make_openmoe() -> None:
    """No dropping (a factor so large that every choice is served), and dropping with a factor of 0.6."""
    tensors = fuse(OPENMOE, random_tensors(OPENMOE))
    tokens = prompts(OPENMOE)
    tokens[:, 0] = 0
    free = openmoe_numpy.forward(OPENMOE, tensors, tokens, capacity_factor=1e9)
    dropping = openmoe_numpy.forward(OPENMOE, tensors, tokens, capacity_factor=0.6)
    sequence = tokens[:1]
    for _ in range(GREEDY_TOKENS):
        last = openmoe_numpy.forward(OPENMOE, tensors, sequence, capacity_factor=1e9).logits[0, -1]
        sequence = np.append(sequence, [[np.argmax(last)]], axis=1)
    np.savez_compressed(
        HERE / "openmoe.npz",
        config=json.dumps(OPENMOE),
        tokens=tokens,
        greedy=sequence[0, tokens.shape[1] :].astype(np.int32),
        logits=free.logits.astype(np.float32),
        hidden=free.hidden.astype(np.float32),
        chosen=free.chosen.astype(np.int32),
        drop_factor=0.6,
        drop_logits=dropping.logits.astype(np.float32),
        drop_chosen=dropping.chosen.astype(np.int32),
        drop_kept=dropping.kept,
    )
    print(f"openmoe              logit std {free.logits.std():.2f}  dropped {np.sum(~dropping.kept)} choices")


def main() -> None:
    make_openmoe()
    for name, raw in CONFIGS.items():
        make_transformers(name, raw)


if __name__ == "__main__":
    main()
