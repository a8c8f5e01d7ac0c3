"""How many layers get which policy: the fastest choice within a memory budget."""
