"""Checkpoints the layers of a model."""
