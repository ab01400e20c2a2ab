"""What is wrong with a run, by its numbers, and what to write instead; what would go wrong with a new one."""
