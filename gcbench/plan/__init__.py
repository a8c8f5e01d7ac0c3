"""`gcbench plan`: the fastest setting that fits."""
