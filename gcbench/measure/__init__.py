"""`gcbench run`: measures the peak memory and the times of real training steps."""
