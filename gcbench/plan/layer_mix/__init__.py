"""Chooses a policy for each layer: the fastest choice within a memory budget."""
