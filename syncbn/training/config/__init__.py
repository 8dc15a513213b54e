"""Settings: their types and ranges, the plan that is derived from them, and the comparison of two runs' settings."""
