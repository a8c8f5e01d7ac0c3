"""The training step, and what it draws at random."""
