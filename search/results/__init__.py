"""What a run has found: the Pareto fronts, the finalists, the winners, and how they are printed."""
