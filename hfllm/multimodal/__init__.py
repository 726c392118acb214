"""Models that see and hear: composing them of a text model and a tower, and the processors that feed them."""
