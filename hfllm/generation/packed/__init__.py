"""Decoding over packed weights, in a cache whose rows have different lengths."""
