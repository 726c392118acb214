"""Evaluation: alignment, perplexity, few-shot questions, quantization."""
