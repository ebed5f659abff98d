"""Small routing traces whose routing follows from task and embedding."""

import numpy as np

from emoe_jax.traces import RoutingTrace

TASKS = ("qa/short", "qa/long", "chat")


def make_trace(
    prompts: int = 24,
    layers: int = 3,
    experts: int = 8,
    top_k: int = 2,
    dim: int = 5,
    tokens: int = 40,
    seed: int = 0,
) -> RoutingTrace:
    """Router logits are a task's plus a linear function of the embedding, if `dim` is not 0; top-k of noisy ones."""
    fixed = np.random.default_rng(99)
    of_task = fixed.normal(size=(len(TASKS), layers, experts))
    of_embedding = fixed.normal(size=(max(dim, 1), layers, experts))
    rng = np.random.default_rng(seed)
    task = rng.integers(len(TASKS), size=prompts).astype(np.int16)
    embedding = rng.normal(size=(prompts, dim)).astype(np.float16)
    sample = np.repeat(np.arange(prompts, dtype=np.int32), tokens)
    logits = of_task[task]
    if dim:
        logits = logits + 0.7 * np.einsum("pd,dme->pme", embedding.astype(np.float32), of_embedding)
    noisy = logits[sample] + rng.gumbel(size=(len(sample), layers, experts))
    chosen = np.argsort(-noisy, axis=-1)[..., :top_k].astype(np.uint8)
    return RoutingTrace(
        experts=chosen,
        probs=np.full(chosen.shape, 1 / top_k, np.float16),
        sample=sample,
        token_pos=np.tile(np.arange(tokens, dtype=np.int32), prompts),
        task=task,
        task_names=TASKS,
        num_experts=experts,
        prompt_embedding=embedding if dim else None,
    )
