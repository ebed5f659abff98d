"""Mutants of the engine: each cuts one mechanism out of it, and a test has to notice."""
