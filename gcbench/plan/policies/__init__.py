"""Finds the operator outputs worth saving in a checkpointed layer: the trade-off curve of bytes and seconds."""
