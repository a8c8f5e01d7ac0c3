"""Composes a whole step from the traces of a few layers."""
