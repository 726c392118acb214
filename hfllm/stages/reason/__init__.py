"""The reason recipe: flags.py (light) and build.py (heavy)."""
