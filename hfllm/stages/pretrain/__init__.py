"""The pretrain recipe, and that of the tokenizer before it: flags.py (light) and build.py (heavy)."""
