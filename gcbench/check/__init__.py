"""`gcbench check`: tests whether checkpointing leaves the gradients of a model unchanged."""
