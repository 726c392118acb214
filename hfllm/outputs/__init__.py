"""What a run leaves: checkpoints, report, model card, and what goes to the Hub."""
