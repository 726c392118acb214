"""The chat recipe: flags.py (light) and build.py (heavy)."""
