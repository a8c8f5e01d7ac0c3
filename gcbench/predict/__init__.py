"""`gcbench predict`: the memory of training steps on a device that need not be here."""
