"""Reward models: of comparisons, and of steps."""
