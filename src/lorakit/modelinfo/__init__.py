"""Facts of a model: its modules, their shapes and counts, without torch and without its weights."""
