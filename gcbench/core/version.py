"""The version of gcbench."""

__version__ = "0.1.0"
