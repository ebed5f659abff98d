"""Prints an answer while it is computed, with nothing substituted: `python examples/stream.py [CHECKPOINT]`."""

import sys
from pathlib import Path

from emoe_jax import Engine, SamplingParams

DEMO = Path(__file__).parents[1] / "checkpoints" / "demo"


def main(checkpoint: str | Path = DEMO) -> None:
    with Engine.load(checkpoint, expert_memory="40%") as engine:
        assert engine.tokenizer is not None
        prompt = engine.tokenizer.chat([{"role": "user", "content": "Hello, how are you?"}])
        # `exact` loads what the routers choose. A request may ask for it whatever the engine's default is.
        for delta in engine.stream(prompt, SamplingParams(max_tokens=32, temperature=0), routing="exact"):
            print(delta.text, end="", flush=True)
        print()


if __name__ == "__main__":
    main(*sys.argv[1:])
