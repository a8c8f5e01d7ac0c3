"""A whole step from traced layers."""
