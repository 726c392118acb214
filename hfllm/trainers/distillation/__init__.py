"""Knowledge distillation: a student learns from a teacher's distributions."""
