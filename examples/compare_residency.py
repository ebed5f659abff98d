"""One question with fewer and fewer experts on the device: `python examples/compare_residency.py [CHECKPOINT]`."""

import sys
from pathlib import Path

from emoe_jax import Engine, SamplingParams

DEMO = Path(__file__).parents[1] / "checkpoints" / "demo"
SHARES = ("100%", "40%", "20%")


def main(checkpoint: str | Path = DEMO) -> None:
    question = "What is the sentiment of this text?\nText: The music was lovely."
    params = SamplingParams(max_tokens=16, temperature=0)
    print(f"> {question}")
    for share in SHARES:
        with Engine.load(checkpoint, expert_memory=share) as engine:
            assert engine.tokenizer is not None
            prompt = engine.tokenizer.chat([{"role": "user", "content": question}])
            for routing in ("resident", "exact"):
                output = engine.generate(prompt, params, routing=routing)[0]
                print(f"{share:>5} {routing:<9} {output.substituted:6.1%} substituted: {output.text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
