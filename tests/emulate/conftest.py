"""Fixtures of this folder: the driver of the emulated cards, and a process that calls it."""

from emulated_driver import call, driver

__all__ = ["call", "driver"]
