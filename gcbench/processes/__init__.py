"""Runs tasks in child processes and passes their events on. Knows no command: a task names its handler."""
