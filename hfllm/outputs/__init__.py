"""Outputs of a run: checkpoints, report, model card, and uploads to the Hub."""
