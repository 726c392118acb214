"""What learns: PPO, distillation, pretraining, and what they share."""
