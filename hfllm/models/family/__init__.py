"""The architecture: the files saved together with weights, and the presets."""
