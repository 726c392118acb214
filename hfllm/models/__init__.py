"""The model architecture, its presets and conversion."""

# Must come before the modules here are loaded: importing transformers registers them all (hfllm.registration).
import transformers  # noqa: F401
