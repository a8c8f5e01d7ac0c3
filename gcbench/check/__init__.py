"""`gcbench check`: whether checkpointing leaves the gradients of a model as they are."""
