"""Names the cause of what went wrong, where it is known."""
