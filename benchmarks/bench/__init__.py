"""`emoe bench`: latency, throughput, a server under load, and kernels. Flags have the names that vLLM gives them."""
