"""What several recoveries share: moments without images, filters behind batch norms, values of a forward pass."""
