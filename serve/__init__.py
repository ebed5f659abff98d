"""OpenAI-compatible HTTP server over one engine. Start it with `python -m serve.main`."""
