"""Replicas of the server on a Ray cluster, and what stands in front of them."""
