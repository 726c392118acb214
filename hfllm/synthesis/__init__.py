"""Data written by models: answers, comparisons, mixed prompts."""
