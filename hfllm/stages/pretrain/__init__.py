"""The pretrain recipe, and the recipe of the tokenizer before it: flags.py (light) and build.py (heavy)."""
