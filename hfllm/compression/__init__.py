"""How small: quantization schemes, an affine reference, sensitivity."""
