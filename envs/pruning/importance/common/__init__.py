"""What several importances share: the tensors of each unit, and how the consumers of a group read it."""
