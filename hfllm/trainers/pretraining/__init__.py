"""Pretraining on packed rows in planned batches."""
