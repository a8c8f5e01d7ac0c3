"""Find, configure and build models: sources, catalogue, config, adapters."""
