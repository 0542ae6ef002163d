"""Code that several importances use: the tensor entries of each unit, and the inputs of a group's consumers."""
