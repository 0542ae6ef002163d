"""Code that several quantizers use: the grids of weights and of activations."""
