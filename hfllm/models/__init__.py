"""The architecture."""

# Before any module here is half-loaded: importing transformers registers them all (hfllm.registration).
import transformers  # noqa: F401
