"""CUDA's caching allocator as arithmetic."""
