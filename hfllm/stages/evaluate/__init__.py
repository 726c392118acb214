"""The evaluate recipe, flags.py (light) and build.py (heavy), and compare (of samples)."""
