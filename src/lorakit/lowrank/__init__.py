"""The mathematics of low-rank factors: starts, combinations, rank budgets. Matrices, no modules."""
