"""Runs any training script, unmodified, on an emulated card, and reports its memory."""
