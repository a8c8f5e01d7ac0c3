"""Simulates a training step on a device that is not here: traces it on fake tensors, and replays its allocations."""
