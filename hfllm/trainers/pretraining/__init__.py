"""Pretraining on packed rows by a plan of batches."""
