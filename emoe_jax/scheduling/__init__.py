"""Which requests run when: continuous batching, admission policies, and the cost model they decide by. Pure Python."""
