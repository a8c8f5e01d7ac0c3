"""Operators of torch: what a call is, as text, and made again."""
