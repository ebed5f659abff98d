"""Answers two prompts with 40 % of the experts on the device: `python examples/generate.py [CHECKPOINT]`."""

import sys
from pathlib import Path

from emoe_jax import Engine, SamplingParams

DEMO = Path(__file__).parents[1] / "checkpoints" / "demo"


def main(checkpoint: str | Path = DEMO) -> None:
    questions = ["Hello, how are you?", "What is the sentiment of this text?\nText: The music was lovely."]
    with Engine.load(checkpoint, expert_memory="40%", routing="resident") as engine:
        assert engine.tokenizer is not None
        prompts = [engine.tokenizer.chat([{"role": "user", "content": question}]) for question in questions]
        outputs = engine.generate(prompts, SamplingParams(max_tokens=32, temperature=0))
    for question, output in zip(questions, outputs, strict=True):
        lost = f"{output.substituted:.1%} of expert choices substituted"
        print(f"> {question}\n{output.text}\n  task {output.task}, {lost}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
