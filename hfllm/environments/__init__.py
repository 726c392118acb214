"""Surroundings for a policy to act in: episodes of several turns, tools and their results."""
