"""Models that see, and the processors that feed them; models that hear can be composed, and nothing feeds them yet."""
