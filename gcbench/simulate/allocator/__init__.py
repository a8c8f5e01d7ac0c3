"""Simulates CUDA's caching allocator."""
