"""What a policy can act in: episodes of several turns, tools and their results."""
