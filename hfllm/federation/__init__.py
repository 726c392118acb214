"""Organisations fine-tune one model together and keep their rows: updates, averages, privacy and transports."""
