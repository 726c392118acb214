"""Images in files, and in the rows of any stage."""
