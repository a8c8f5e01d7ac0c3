"""Shared by every other package: records, errors, units, files."""
