"""Calls of torch's operators: their schema, their text, and their replay."""
