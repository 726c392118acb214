"""Compression: quantization schemes with their sensitivity, and int8 arithmetic."""
