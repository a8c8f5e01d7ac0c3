"""From settings to cells: checks settings, describes machine and model, resolves defaults."""
