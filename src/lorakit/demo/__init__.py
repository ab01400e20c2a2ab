"""The demo: a real task, its data and its run."""
