"""The rlhf recipe: flags.py (light) and build.py (heavy)."""
