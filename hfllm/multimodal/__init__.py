"""Vision-language models and their processors; audio models can be composed, but have no processors yet."""
