"""How good: alignment, perplexity, few-shot questions, quantization."""
