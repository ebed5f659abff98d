"""One plan of the device's memory: expert budget, slab and KV cache, workspace, and trades between them under load."""
