"""Operator times of this machine: measured, stored, and interpolated for any call."""
