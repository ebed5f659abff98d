"""`python -m benchmarks.memory`: what a model needs of a device, by prompt length, batch and resident experts."""
