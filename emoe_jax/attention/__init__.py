"""Grouped-query attention: `uncached` (a sequence to itself) and `paged` (over the KV cache), by the same sums."""
