"""The label recipe: flags.py (light), items, votes, and the page."""
