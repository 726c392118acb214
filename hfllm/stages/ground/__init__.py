"""The ground recipe: flags.py (light) and build.py (heavy)."""
