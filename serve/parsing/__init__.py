"""Reasoning and calls of tools, told from the text of an answer while it comes."""
