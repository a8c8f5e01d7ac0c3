"""What operators take on this machine: measured, stored, asked for any work."""
