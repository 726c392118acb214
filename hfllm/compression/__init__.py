"""Compression: quantization schemes, an affine reference, sensitivity."""
