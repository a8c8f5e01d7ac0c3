"""The command line: parses flags and calls one function per command."""
