"""What a training step would take on a device that is not here: the same step on fake tensors, replayed."""
