"""How fast: speculative decoding, and the choice of a key-value cache."""
