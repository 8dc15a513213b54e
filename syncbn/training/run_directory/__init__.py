"""Run directories: names and paths, the lock, and the files ``run.json``, ``result.json`` and ``config.yaml``."""
