"""The constitution recipe: flags.py (light), build.py (heavy) and report.py."""
