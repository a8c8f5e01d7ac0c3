"""Devices: cards by name, what a step is simulated for, and what runs here."""
