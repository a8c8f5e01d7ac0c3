"""The kernels, buffers and workspaces of a CUDA card, for a step on fake CPU tensors."""
