"""gcbench: which gradient-checkpointing setting to use, measured on the real model."""

__version__ = "0.1.0"
