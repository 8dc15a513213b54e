"""From the command line to composed settings: Hydra's errors as one line, and settings that nothing reads."""
