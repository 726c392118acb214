"""How big: what a model of a given shape costs to train and to serve. Plain Python; nothing here imports torch."""
