"""What goes in: sources, formats, packing, tokenizers, the embedded world, curation."""
