"""Data: sources, formats, packing, tokenizers, the embedded world, curation."""
