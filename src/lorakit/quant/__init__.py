"""How frozen weights live in memory."""
