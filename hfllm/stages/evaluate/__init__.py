"""The evaluate recipe: flags.py (light), build.py (heavy) and report.py."""
