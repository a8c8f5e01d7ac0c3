"""Find the known cause of a failure or of wrong gradients, with its remedy."""
