"""Data written by models: answers, comparisons, mixed prompts, revisions by a constitution."""
