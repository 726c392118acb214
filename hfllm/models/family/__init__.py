"""The architecture: the files that travel with saved weights, and the presets."""
