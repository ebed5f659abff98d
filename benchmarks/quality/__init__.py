"""What answers and texts lose when not all experts are resident: `python -m benchmarks.quality`."""
