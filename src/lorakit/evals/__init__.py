"""How good a model is: held-out loss, perplexity, and the texts it writes."""
