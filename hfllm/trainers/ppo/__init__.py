"""Proximal policy optimization for language models: start with `trainer.py`, then `formulas.py`."""
