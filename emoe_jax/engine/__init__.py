"""The engine: requests in, scheduled steps over the slab, tokens out."""
