"""The vision recipe: flags.py (light) and build.py (heavy)."""
