"""What a run will need, from its configuration alone: the real step compiled, with no weight in memory."""
