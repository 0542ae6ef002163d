"""Training of networks: the loop that all trainings share, and training with distillation from the dense model."""
