"""A step at other batch sizes and with other choices for its layers, from steps that were traced."""
