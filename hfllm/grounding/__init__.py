"""A model's knowledge: passages given to it, how sure it is, and whether its claims hold."""
