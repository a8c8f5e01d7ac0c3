"""What a step on a CUDA card runs and allocates, for a step on fake CPU tensors."""
