"""Lightning loggers for ``metrics.csv`` and Weights & Biases (W&B), which continue after a resume."""
