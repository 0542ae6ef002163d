"""The last step: winners of a search are trained with distillation from the dense model, exported and verified."""
