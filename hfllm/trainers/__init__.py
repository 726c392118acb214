"""Trainers: PPO, distillation, pretraining, and their common parts."""
