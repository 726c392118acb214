"""Saved models, adapters and weights: read, checked, merged and written whole."""
