"""What a model knows: passages that it is given, how sure it is, and whether its claims hold."""
