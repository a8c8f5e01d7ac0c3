"""Emulated cards: PyTorch's own CUDA code runs on cards that are not there, and computes nothing.

A C library stands in for NVIDIA's: it hands out addresses that nobody can touch, counts them against a card's memory
and runs no kernel. `environment` prepares it for a child process; `library` builds it; `csrc/` is its source.
"""
