"""Devices: the catalogue of cards, the target of a prediction, and the backends that run a step."""
