"""Memory, plans and scaling laws, in plain Python and numpy; nothing here imports torch."""
