"""Sockets, connections and what is around every request: hosts, keys, sizes, time limits."""
