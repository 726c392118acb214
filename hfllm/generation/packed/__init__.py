"""Decoding over packed weights, in a cache whose rows have lengths of their own."""
