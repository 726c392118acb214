"""Conversion between the family and native architectures, by one table of families."""
