"""The scaling_laws recipe: flags.py (light), report.py (a table of runs) and build.py (the grid, heavy)."""
