"""`gcbench predict`: what training steps would take on a device that is not here."""
