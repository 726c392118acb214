"""Suites of questions that a model is judged by, each in a file, all by one contract: see `base`."""
