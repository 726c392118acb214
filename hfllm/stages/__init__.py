"""The long recipes' arguments, checks and builders, a file or a folder for each stage."""
