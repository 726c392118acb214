"""The sft recipe: flags.py (light) and build.py (heavy)."""
