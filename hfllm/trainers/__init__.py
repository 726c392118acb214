"""Trainers: PPO, distillation, pretraining, and what they share."""
