"""The tools recipe: flags.py (light) and build.py (heavy)."""
