"""Forms of parallelism that need code of their own: pipeline schedules and context-parallel attention."""
