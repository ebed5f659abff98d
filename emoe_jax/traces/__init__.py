"""Routing traces: what routers chose, token by token, in a file that trainer and replay read."""

from emoe_jax.traces.trace import RoutingTrace, TraceError

__all__ = ["RoutingTrace", "TraceError"]
