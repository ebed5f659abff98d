"""Requests of two tasks that need no model to draw."""

from benchmarks.serving.workload import Sample

SAMPLES = {
    "short": [Sample(10, 2, ({"role": "user", "content": "a?"},)), Sample(20, 2, ({"role": "user", "content": "b?"},))],
    "long": [
        Sample(200, 6, ({"role": "user", "content": "c?"},)),
        Sample(150, 60, ({"role": "user", "content": "d"},)),
    ],
}
