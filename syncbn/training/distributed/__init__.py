"""Distributed training as a rank sees it: launcher, store, Slurm, DDP, signals, unresponsive ranks."""
