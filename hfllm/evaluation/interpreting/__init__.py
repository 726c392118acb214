"""Where a model keeps what it says: lens, attention, probes, patching, attribution, and plants that test them."""
