"""What a run will take, before it runs: memory by a dry run of the real step, time by a short measured probe."""
