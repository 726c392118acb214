"""Serving a model."""
