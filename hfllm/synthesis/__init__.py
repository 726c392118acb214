"""Data that models write: answers, comparisons, mixed prompts."""
