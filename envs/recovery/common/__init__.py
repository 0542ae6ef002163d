"""Code that several recoveries use: moments without images, filters and batch norms, values of a forward pass."""
