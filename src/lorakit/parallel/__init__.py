"""Several processes: who they are, how they agree, and how gradients and weights are shared among them."""
