"""A training step traced on fake tensors (shapes and dtypes, no data)."""
