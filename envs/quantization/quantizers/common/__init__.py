"""What several quantizers share: the grids of weights and of activations."""
