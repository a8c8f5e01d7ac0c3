"""What every other package speaks in: records, errors, units, files."""
