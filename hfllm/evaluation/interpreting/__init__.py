"""Where a model keeps its answers: lens, attention, probes, patching, attribution, and plants to test them."""
