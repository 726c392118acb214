"""The long recipes' arguments, checks and builders, one file for each stage."""
