"""What runs on the accelerator: batches, step functions, the KV cache, the sampler, and the runner of step plans."""
