"""Floor 1: codecs, packed plain tensors <-> weight."""
