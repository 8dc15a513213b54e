"""Search: the value that a sweeper such as Optuna optimizes, and what it reports about the trials."""
