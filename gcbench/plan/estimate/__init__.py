"""Computes steps at other batch sizes and with other policies for their layers from traced steps."""
