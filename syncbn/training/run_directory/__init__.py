"""The run directory: its path, its lock, and its record."""
