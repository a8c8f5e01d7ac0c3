"""Checkpoints the layers of a model: applies plans, saves and recomputes by policy, counts what is recomputed."""
