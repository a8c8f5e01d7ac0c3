"""From settings to cells: the machine and the model described, defaults decided."""
