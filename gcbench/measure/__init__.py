"""`gcbench run`: real training steps, their peak memory and their times."""
